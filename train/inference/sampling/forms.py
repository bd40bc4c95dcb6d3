"""Forms of answers: how much more often one is right than other answers to the same problems.

A small base computes in `3 + 4 = 7` and guesses in `The answer is 7.`: both are kept where they are
right, but only the first teaches how to get there. All sampled answers, wrong ones too, tell them
apart.
"""

import re
from collections.abc import Sequence

from carryon.train.inference.scoring.answer_file import Answer

_NUMBER = re.compile(r"[-+]?\d[\d.,]*")
_HEAD_WORDS = 6
_PRIOR = 8.0
"""Answers that what is known of the wider group counts for."""


def form_of(text: str) -> str:
    """Return a text with a zero for each number, in lower case and single spaces."""
    return " ".join(_NUMBER.sub("0", text).casefold().split()).rstrip(".")


def rate_forms(answers: Sequence[Sequence[Answer]]) -> list[list[float]]:
    """Return for each answer the advantage of its form, between -1 and 1; pure.

    The gain of an answer is 1 if it is right, else 0, less the mean of its problem: a form is not
    worse for being that of hard problems. The advantage is the mean gain of answers of this form to
    other problems, so that luck in this one does not count. What they lack up to _PRIOR is filled
    with the advantage of the form's first words; a form of its own has none.

    Args:
        answers: for each problem its answers.
    """
    rows = [_sum_gains(row) for row in answers]
    total = _Gains()
    for row in rows:
        for group, (gain, number) in row.items():
            total.add(group, gain, number)
    return [
        [_advantage(answer, total, own) for answer in row]
        for row, own in zip(answers, rows, strict=True)
    ]


class _Gains(dict[str, tuple[float, int]]):
    """Group of answers -> the sum of their gains, and their number."""

    def add(self, group: str, gain: float, number: int) -> None:
        before, others = self.get(group, (0.0, 0))
        self[group] = (before + gain, others + number)


def _sum_gains(row: Sequence[Answer]) -> _Gains:
    """Return the gains of the answers to a problem."""
    mean = sum(answer.is_right for answer in row) / max(len(row), 1)
    gains = _Gains()
    for answer in row:
        for group in _groups(answer):
            gains.add(group, answer.is_right - mean, 1)
    return gains


def _advantage(answer: Answer, total: _Gains, own: _Gains) -> float:
    advantage = 0.0
    for group in _groups(answer):
        (gain, number), (own_gain, own_number) = total[group], own[group]
        others = number - own_number
        advantage = (gain - own_gain + _PRIOR * advantage) / (others + _PRIOR)
    return advantage


def _groups(answer: Answer) -> tuple[str, str]:
    """Return the groups of an answer, the wider first: first words, and form."""
    form = form_of(answer.text)
    return f"head {' '.join(form.split()[:_HEAD_WORDS])}", f"form {form}"
