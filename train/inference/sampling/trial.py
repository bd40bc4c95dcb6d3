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

TRIED = 20
"""Problems of each task that every set is tried on first; each further round poses twice as many
to the better half of the sets (successive halving, arXiv 1502.07943): 50 for each set told sets of
48 and 70 % not apart."""


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
    """Return the arm and the set of examples that is left of those that were tried.

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
    left, num = list(range(len(sets))), TRIED
    while len(left) > 1:
        few = {task: each[:num] for task, each in problems.items() if each}
        rights = dict[int, int]()
        for number in left:
            own = name_set(arm, number)
            shown = sets[number]
            answer_problems(
                own, model, few, examples=shown, file=file, settings=settings, samples=1
            )
            verdicts = judge(few, [own], file=file, samples=1)
            rights[number] = sum(
                answer.is_right and (keep_cut or not answer.is_cut)
                for arms in verdicts.values()
                for [answer] in arms[own.name]
            )
        is_last = all(num >= len(each) for each in problems.values())
        kept = 1 if is_last else (len(left) + 1) // 2
        counts = ", ".join(f"{number + 1}: {rights[number]}" for number in left)
        left = sorted(sorted(left, key=lambda number: (-rights[number], number))[:kept])
        logger.info(
            f"sets of examples, right answers of {sum(map(len, few.values()))}: {counts}; left: "
            f"{', '.join(str(number + 1) for number in left)}"
        )
        num *= 2
    [best] = left
    return (name_set(arm, best) if len(sets) > 1 else arm), sets[best]


def name_set(arm: Arm, number: int) -> Arm:
    """Return the arm under the name of a set, counted from 0."""
    return replace(arm, name=f"{arm.name}, examples {number + 1}")
