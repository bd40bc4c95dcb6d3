"""Forms of answers: how much more often one is right than other answers to the same problems.

A small base computes in `3 + 4 = 7` and guesses in `The answer is 7.`: both are kept where they are
right, but only the first teaches how to get there. All sampled answers, wrong ones too, tell them
apart.
"""

import re
from collections import Counter
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
    total, count = Counter[str](), Counter[str]()
    own_totals, own_counts = list[Counter[str]](), list[Counter[str]]()
    for row in answers:
        mean = sum(answer.is_right for answer in row) / max(len(row), 1)
        own_total, own_count = Counter[str](), Counter[str]()
        for answer in row:
            for group in _groups(answer):
                own_total[group] += answer.is_right - mean  # type: ignore[assignment]
                own_count[group] += 1
        own_totals.append(own_total)
        own_counts.append(own_count)
        for group, gain in own_total.items():
            total[group] += gain
        count.update(own_count)

    def rate(answer: Answer, row: int) -> float:
        advantage = 0.0
        for group in _groups(answer):
            others = total[group] - own_totals[row][group]
            number = count[group] - own_counts[row][group]
            advantage = (others + _PRIOR * advantage) / (number + _PRIOR)
        return advantage

    return [[rate(answer, place) for answer in row] for place, row in enumerate(answers)]


def _groups(answer: Answer) -> tuple[str, str]:
    """Return the groups of an answer, the wider first: first words, and form."""
    form = form_of(answer.text)
    return f"head {' '.join(form.split()[:_HEAD_WORDS])}", f"form {form}"
