"""Which problems are posed: unsolved ones, those with a known answer, those that fit the base."""

import logging
from collections.abc import Mapping, Sequence

from carryon.cache.errors import InputError, NothingRightError
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.sampling.asking import Asking
from carryon.train.inference.sampling.examples import Examples
from carryon.train.inference.scoring.arms import Arm
from carryon.train.inference.scoring.models import Answerer
from carryon.train.inference.scoring.problems import Problem

logger = logging.getLogger(__name__)


def pose(
    problems: Mapping[str, Sequence[Problem]], known: Mapping[str, Sequence[str]], asking: Asking
) -> dict[str, Sequence[Problem]]:
    """Return the problems to pose."""
    if not asking.unsolved:
        return dict(problems)
    left = {
        task: [problem for problem in each if problem.question not in known]
        for task, each in problems.items()
    }
    total = sum(map(len, problems.values()))
    num_left = sum(map(len, left.values()))
    logger.info(f"{num_left:,} of {total:,} problems have no answer in --known: these")
    if not num_left:
        raise NothingRightError(
            f"--unsolved: expected a problem without an answer in --known, got none of {total:,}. "
            "Fix: leave out --unsolved, or raise --num"
        )
    return {task: each for task, each in left.items() if each}


def drop_unhinted(problems: Examples, hint: str) -> dict[str, Sequence[Problem]]:
    """Return the problems whose right answer a hint can tell.

    Raises:
        NothingRightError: there are none.
    """
    if not hint:
        return dict(problems)
    left = {
        task: [problem for problem in each if problem.result] for task, each in problems.items()
    }
    total, num_left = (sum(map(len, each.values())) for each in (problems, left))
    if not num_left:
        raise NothingRightError(
            f"--hint: expected problems whose right answer is known, got none of {total:,}. Fix: "
            "leave out --hint"
        )
    if num_left < total:
        logger.warning(f"{total - num_left:,} of {total:,} problems have no known answer: left out")
    return {task: each for task, each in left.items() if each}


def fit(
    problems: Mapping[str, Sequence[Problem]],
    arm: Arm,
    model: Answerer,
    examples: Examples,
    asking: Asking,
    settings: GenerateSettings,
) -> tuple[dict[str, list[Problem]], int]:
    """Return the problems whose prompt leaves room for an answer, and the number of others.

    Raises:
        InputError: some prompts are too long and may not be left out, or all are.
    """
    room = model.context_tokens - settings.max_new_tokens
    kept, long = dict[str, list[Problem]](), list[tuple[Problem, int]]()
    for task, each in problems.items():
        rows = model.encode([arm.make_prompt(problem, examples[task]) for problem in each])
        sizes = [(problem, len(row)) for problem, row in zip(each, rows, strict=True)]
        long += [(problem, size) for problem, size in sizes if size > room]
        kept[task] = [problem for problem, size in sizes if size <= room]
    if not long:
        return kept, 0
    total = sum(map(len, problems.values()))
    line = (
        f"prompt: expected at most {room} tokens, so that {settings.max_new_tokens} new ones fit "
        f"in the base's {model.context_tokens}; {len(long):,} of {total:,} are longer, the first "
        f"is {long[0][0].id} with {long[0][1]}"
    )
    if not asking.drop_long or len(long) == total:
        fix = "a smaller --max-new-tokens" + ", or --drop-long" * (len(long) < total)
        raise InputError(f"{line}. Fix: {fix}")
    logger.warning(f"{line}: left out")
    return {task: each for task, each in kept.items() if each}, len(long)
