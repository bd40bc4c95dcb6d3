"""Steps of an experiment: commands of carryon or of the experiment, each run once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from carryon.tools.cli.main import CARRYON
from carryon.tools.cli.program import Program
from carryon.tools.improve.steps import Step, run_step


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A command that is to be run once."""

    result: Path
    """File of its result."""
    argv: list[str]


def check_steps(steps: Sequence[Planned], *, own: Program) -> None:
    """Refuse words that a command does not take, before the first step and not after hours.

    Args:
        steps: of an experiment.
        own: the experiment's commands, beside those of carryon.
    """
    for step in steps:
        _program(step, own).check(step.argv[0], step.argv[1:])


def run_steps(steps: Sequence[Planned], *, own: Program) -> dict[Path, Step]:
    """Run the steps that are not done, in order; return all by the file of their result.

    Args:
        steps: of an experiment.
        own: the experiment's commands, beside those of carryon.
    """
    return {
        step.result: run_step(step.result, step.argv, files={}, program=_program(step, own))
        for step in steps
    }


def _program(step: Planned, own: Program) -> Program:
    return own if step.argv[0] in own.commands else CARRYON
