"""Count right answers: fractions with intervals, arms against the first one, pass@k."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from carryon.cache.errors import InputError
from carryon.train.inference.scoring.answer_file import Answer, AnswerFile
from carryon.train.inference.scoring.arms import Arm
from carryon.train.inference.scoring.comparison import compare_paired, pass_at_k, wilson_interval
from carryon.train.inference.scoring.problems import Problem

logger = logging.getLogger(__name__)

_MOSTLY_CUT = 0.5
_SHOWN, _SHOWN_CHARS = 3, 60
_KS = (1, 2, 4, 5, 8, 10, 16, 32, 64, 100)


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmScore:
    """Counts of an arm on the problems of a task."""

    arm: str
    problems: int
    right: float
    """Right answers; of several to a problem their fraction counts."""
    accuracy: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    pass_at: Mapping[str, float]
    """k -> estimate that one of k answers is right; empty for a single answer."""
    won: int
    """Problems on which it did better than the first arm."""
    lost: int
    p: float
    """Of a two-sided sign test against the first arm."""
    cut: float
    """Fraction of answers that the limit of new tokens ended."""
    found: float
    """Fraction of answers in which the rule found something to compare."""
    tokens: int
    """New tokens of all answers."""
    seconds: float
    tokens_per_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def judge(
    problems: Mapping[str, Sequence[Problem]],
    arms: Sequence[Arm],
    *,
    file: AnswerFile,
    samples: int,
) -> dict[str, dict[str, list[list[Answer]]]]:
    """Return task -> arm -> for each problem its answers, judged by the rules of the problems.

    The verdicts in `file` are brought up to date.
    """
    judged: dict[str, dict[str, list[list[Answer]]]] = {}
    for task, each in problems.items():
        judged[task] = {}
        for arm in arms:
            judged[task][arm.name] = [
                [
                    replace(answer, is_right=problem.is_right(answer.text), right=problem.answer)
                    for sample in range(samples)
                    for answer in [file.answers[task, arm.name, problem.id, sample]]
                ]
                for problem in each
            ]
    file.replace(
        answer
        for arms_ in judged.values()
        for rows in arms_.values()
        for row in rows
        for answer in row
    )
    return judged


def count(
    problems: Sequence[Problem], answers: Mapping[str, Sequence[Sequence[Answer]]]
) -> list[ArmScore]:
    """Return the counts of each arm on the problems of one task.

    Args:
        problems: of the task.
        answers: arm -> for each problem its answers.

    Raises:
        InputError: the rule finds nothing in any answer, or all answers were cut and none of them
            is right: nothing was measured.
    """
    _refuse_unmeasured(problems, answers)
    shares = {
        arm: [sum(answer.is_right for answer in each) / len(each) for each in rows]
        for arm, rows in answers.items()
    }
    first = next(iter(shares.values()))
    return [_count(arm, problems, rows, shares[arm], first) for arm, rows in answers.items()]


def _count(
    arm: str,
    problems: Sequence[Problem],
    rows: Sequence[Sequence[Answer]],
    shares: Sequence[float],
    first: Sequence[float],
) -> ArmScore:
    num, right = len(problems), sum(shares)
    low, high = wilson_interval(right, num)
    paired = compare_paired(first, shares)
    pairs = [
        (problem, answer) for problem, row in zip(problems, rows, strict=True) for answer in row
    ]
    seconds = sum(answer.seconds for _, answer in pairs)
    tokens = sum(answer.tokens for _, answer in pairs)
    cut = sum(answer.is_cut for _, answer in pairs) / len(pairs)
    if cut >= _MOSTLY_CUT:
        logger.warning(
            f"{arm}: {cut:.0%} of the answers were cut at the limit. Fix: raise --max-new-tokens"
        )
    return ArmScore(
        arm=arm,
        problems=num,
        right=right,
        accuracy=right / num,
        low=low,
        high=high,
        pass_at=_pass_at(rows),
        won=paired.won,
        lost=paired.lost,
        p=paired.p,
        cut=cut,
        found=sum(problem.rule.find(answer.text) is not None for problem, answer in pairs)
        / len(pairs),
        tokens=tokens,
        seconds=seconds,
        tokens_per_s=tokens / seconds if seconds else 0.0,
    )


def _pass_at(rows: Sequence[Sequence[Answer]]) -> dict[str, float]:
    samples = len(rows[0])
    if samples == 1:
        return {}
    rights = [sum(answer.is_right for answer in row) for row in rows]
    ks = [k for k in _KS if k < samples] + [samples]
    return {str(k): sum(pass_at_k(samples, right, k) for right in rights) / len(rows) for k in ks}


def _refuse_unmeasured(
    problems: Sequence[Problem], answers: Mapping[str, Sequence[Sequence[Answer]]]
) -> None:
    pairs = [pair for rows in answers.values() for pair in _pairs(problems, rows)]
    rule = problems[0].rule
    shown = ", ".join(f"{answer.text.strip()!a:.{_SHOWN_CHARS}}" for _, answer in pairs[:_SHOWN])
    if all(rule.find(answer.text) is None for _, answer in pairs):
        raise InputError(
            f"rule: {rule.name} finds nothing in any of the {len(pairs):,} answers, such as "
            f"{shown}. Fix: another --rule, or an instruction that asks for this form"
        )
    if all(answer.is_cut and not answer.is_right for _, answer in pairs):
        raise InputError(
            f"max_new_tokens: all {len(pairs):,} answers were cut at the limit and none is right, "
            f"such as {shown}. Fix: raise --max-new-tokens"
        )


def _pairs(
    problems: Sequence[Problem], rows: Sequence[Sequence[Answer]]
) -> list[tuple[Problem, Answer]]:
    return [
        (problem, answer) for problem, row in zip(problems, rows, strict=True) for answer in row
    ]
