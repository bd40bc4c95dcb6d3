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
    may_lack: Path | None = None
    """File that a sampling which finds nothing does not write; later steps go without it."""


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
    done, lacking = dict[Path, Step](), set[str]()
    for step in steps:
        done[step.result] = run_step(
            step.result,
            [word for word in step.argv if word not in lacking],
            files={},
            may_be_empty=step.may_lack is not None,
            program=_program(step, own),
        )
        if step.may_lack and not done[step.result].result:
            lacking.add(str(step.may_lack))
    return done


def _program(step: Planned, own: Program) -> Program:
    return own if step.argv[0] in own.commands else CARRYON
