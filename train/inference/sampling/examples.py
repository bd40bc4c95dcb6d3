"""Solved problems before a question, and hints that tell the right answer; neither is stored.

A base that finds no right answer by itself may write one that it was told. So hard problems reach
the corpus, in the form of the examples: rationalization in STaR (arXiv 2203.14465, section 3.2).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from carryon.cache.errors import InputError
from carryon.train.inference.scoring.arms import Arm
from carryon.train.inference.scoring.models import Answerer
from carryon.train.inference.scoring.problems import (
    PROVENANCE,
    Problem,
    draw_solved,
    find_result,
)

logger = logging.getLogger(__name__)

Examples = Mapping[str, Sequence[Problem]]
"""Task -> solved problems."""


def draw_examples(
    problems: Examples, *, source: str, shots: int, sets: int = 1, seed: int
) -> list[Examples]:
    """Return sets of solved problems for each task, with their results.

    A set has one more than a prompt shows: a problem that is an example itself is not shown.

    Args:
        problems: that are posed.
        source: task or data of the examples. Empty: the task or data posed.
        shots: examples in a prompt. 0: none.
        sets: most sets, which share no question; there is at least one.
        seed: of the draw.

    Raises:
        InputError: there is none.
    """
    if not shots:
        return [{task: [] for task in problems}]
    drawn = {
        task: _draw(source or task, each[0], shots=shots, num=sets * (shots + 1), seed=seed)
        for task, each in problems.items()
    }
    num = max(min(len(each) // (shots + 1) for each in drawn.values()), 1)
    if num < sets:
        logger.info(f"--example-sets: the examples make {num} of {sets}: those")
    return [
        {task: each[at * (shots + 1) : (at + 1) * (shots + 1)] for task, each in drawn.items()}
        for at in range(num)
    ]


def _draw(source: str, posed: Problem, *, shots: int, num: int, seed: int) -> list[Problem]:
    """Return at most `num` solved problems that ask different questions."""
    first = dict[str, Problem]()
    for example in draw_solved(source, num=2 * num + 8, seed=seed):
        first.setdefault(example.folded, example)
    if not first:
        raise InputError(
            f"--examples: expected solved problems, got none in {source}. Fix: other data"
        )
    if len(first) < shots:
        logger.info(f"{source}: {len(first):,} examples, not {shots}: those are shown")
    return [
        replace(each, result=find_result(each.result or each.answer, posed.rule))
        for each in list(first.values())[:num]
    ]


def make_examples(examples: Examples) -> list[dict[str, Any]]:
    """Return solved problems as records that `draw_solved` reads again, in their order; pure."""
    return [
        {"question": each.question, "answer": each.answer, PROVENANCE: {"right": each.result}}
        for task in examples.values()
        for each in task
    ]


def fit_shots(
    arm: Arm, model: Answerer, problems: Examples, examples: Examples, *, room: int
) -> Arm:
    """Return the arm with as many examples as leave room for the longest question that fits alone.

    Args:
        arm: that poses the problems.
        model: of the arm.
        problems: of each task.
        examples: of each task.
        room: most tokens of a prompt.
    """
    alone = replace(arm, shots=0)
    longest = list[tuple[str, Problem]]()
    for task, each in problems.items():
        rows = model.encode([alone.make_prompt(problem, ()) for problem in each])
        sizes = [(len(row), at) for at, row in enumerate(rows) if len(row) <= room]
        longest += [(task, each[max(sizes)[1]])] if sizes else []
    for shots in range(arm.shots, 0, -1):
        fewer = replace(arm, shots=shots)
        prompts = [fewer.make_prompt(problem, examples[task]) for task, problem in longest]
        if all(len(row) <= room for row in model.encode(prompts)):
            break
    else:
        fewer = alone
    if fewer.shots < arm.shots:
        logger.warning(f"--shots: {fewer.shots} of {arm.shots} leave room for an answer: those")
    return fewer
