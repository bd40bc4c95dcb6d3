"""Which solved problems to show: sets of examples are tried, and the best one asks the rest."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.sampling.examples import Examples
from carryon.train.inference.scoring.answer_file import AnswerFile
from carryon.train.inference.scoring.arms import Arm
from carryon.train.inference.scoring.counts import judge
from carryon.train.inference.scoring.models import Answerer
from carryon.train.inference.scoring.problems import Problem
from carryon.train.inference.scoring.run import answer_problems

logger = logging.getLogger(__name__)

TRIED = 50
"""Problems of each task that every set is tried on: one that is 15 points better shows."""


def choose_set(
    arm: Arm,
    model: Answerer,
    problems: Mapping[str, Sequence[Problem]],
    sets: Sequence[Examples],
    *,
    keep_cut: bool,
    file: AnswerFile,
    settings: GenerateSettings,
) -> tuple[Arm, Examples]:
    """Return the arm and the set of examples with which most of the first problems are solved.

    Each set answers under a name of its own, so that the answers of the best one count further on.

    Args:
        arm: that poses the problems.
        model: of the arm.
        problems: of each task.
        sets: of examples; of equal ones the first is chosen.
        keep_cut: whether right answers that were cut at the limit count.
        file: of answers.
        settings: of generation.
    """
    if len(sets) == 1:
        return arm, sets[0]
    few = {task: each[:TRIED] for task, each in problems.items() if each}
    scored = list[tuple[int, int]]()
    for number, shown in enumerate(sets):
        own = name_set(arm, number)
        answer_problems(own, model, few, examples=shown, file=file, settings=settings, samples=1)
        verdicts = judge(few, [own], file=file, samples=1)
        right = sum(
            answer.is_right and (keep_cut or not answer.is_cut)
            for arms in verdicts.values()
            for [answer] in arms[own.name]
        )
        scored.append((right, -number))
    most, best = max(scored)
    counts = ", ".join(str(right) for right, _ in scored)
    total = sum(map(len, few.values()))
    logger.info(f"sets of examples: {counts} of {total} right: number {1 - best} asks the rest")
    return name_set(arm, -best), sets[-best]


def name_set(arm: Arm, number: int) -> Arm:
    """Return the arm under the name of a set, counted from 0."""
    return replace(arm, name=f"{arm.name}, examples {number + 1}")
