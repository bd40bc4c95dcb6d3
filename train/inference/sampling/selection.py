"""Choose among sampled answers: right, whole, each once, and at most a number for each problem."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from carryon.train.inference.sampling.forms import rate_forms
from carryon.train.inference.scoring.answer_file import Answer

_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Counts of answers and problems."""

    problems: int = 0
    tried: int = 0
    """Answers."""
    right: int = 0
    cut: int = 0
    """Answers that the limit of new tokens ended, right or wrong."""
    right_cut: int = 0
    """Right ones among them, which are left out."""
    equal: int = 0
    """Right answers left out since an equal one is kept."""
    surplus: int = 0
    """Right answers left out since their problem has enough."""
    poor_form: int = 0
    """Right answers left out since answers of their form are seldom right."""
    kept: int = 0
    unsolved: int = 0
    """Problems without any right answer."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Answers to keep, by problem, and how many of which kind there were."""

    kept: Sequence[Sequence[Answer]]
    """For each problem."""
    counts: Counts = field(default_factory=Counts)


def select(
    answers: Sequence[Sequence[Answer]],
    *,
    asked: Sequence[str],
    known: Mapping[str, Iterable[str]],
    keep: int,
    keep_cut: bool,
    form_ratio: float = 0.0,
    tasks: Sequence[str] = (),
) -> Selection:
    """Return the answers to keep. Pure; earlier samples come before later ones.

    Args:
        answers: for each problem its answers.
        asked: what each problem asks; equal ones count as one problem.
        known: question -> answers that earlier corpora hold: not kept again, and counted by `keep`.
        keep: most answers for a problem, the known ones included. 0: no limit.
        keep_cut: whether right answers that were cut at the limit of new tokens are kept.
        form_ratio: right answers are left out whose form has an advantage (forms.py) below 0, or
            below this times that of the problem's best right answer. 0: none for its form.
        tasks: of each problem: forms are compared within one. Empty: all are of one.
    """
    kept, equal, surplus, right_cut, poor_form = list[list[Answer]](), 0, 0, 0, 0
    rates = _rate(answers, tasks) if form_ratio else [[0.0] * len(row) for row in answers]
    by_problem = dict[str, set[str]]()
    for row, own, problem in zip(answers, rates, asked, strict=True):
        right = [rate for answer, rate in zip(row, own, strict=True) if answer.is_right]
        least = max(form_ratio * max(right, default=0.0), 0.0) - _ROUNDING
        before = {normalize(text) for each in row[:1] for text in known.get(each.question, ())}
        seen = by_problem.setdefault(problem, before)
        chosen = list[Answer]()
        for answer, rate in zip(row, own, strict=True):
            if not answer.is_right:
                continue
            text = normalize(answer.text)
            if answer.is_cut and not keep_cut:
                right_cut += 1
            elif rate < least:
                poor_form += 1
            elif text in seen:
                equal += 1
            elif keep and len(seen) >= keep:
                surplus += 1
            else:
                chosen.append(answer)
                seen.add(text)
        kept.append(chosen)
    counts = Counts(
        problems=len(answers),
        tried=sum(map(len, answers)),
        right=sum(answer.is_right for row in answers for answer in row),
        cut=sum(answer.is_cut for row in answers for answer in row),
        right_cut=right_cut,
        equal=equal,
        surplus=surplus,
        poor_form=poor_form,
        kept=sum(map(len, kept)),
        unsolved=sum(not any(answer.is_right for answer in row) for row in answers),
    )
    return Selection(kept=kept, counts=counts)


def _rate(answers: Sequence[Sequence[Answer]], tasks: Sequence[str]) -> list[list[float]]:
    """Return the advantage of each answer's form among those of its task."""
    rates = list[list[float]]([[]] * len(answers))
    groups = dict[str, list[int]]()
    for at, task in enumerate(tasks or [""] * len(answers)):
        groups.setdefault(task, []).append(at)
    for group in groups.values():
        for at, own in zip(group, rate_forms([answers[at] for at in group]), strict=True):
            rates[at] = own
    return rates


def normalize(text: str) -> str:
    """Return a text with single spaces, by which equal answers are found."""
    return " ".join(text.split())
