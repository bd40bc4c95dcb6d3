"""Commands killed at any instant: the same command again ends with the same bits."""

import random
import shutil
from pathlib import Path
from typing import Any

from carryon.tools.bench.job import Job
from carryon.tools.bench.trust.calls import Limits, call
from carryon.tools.bench.trust.table import (
    COMMANDS,
    Command,
    Things,
    make_things,
    what_is_wrong,
)

_TRIES = 20
"""A kill behind the end of the command is tried again, at most so often."""


def measure_kills(
    job: Job, *, kills: int = 25, commands: tuple[str, ...] = tuple(COMMANDS)
) -> None:
    """Kill each command of the table, start it again, and compare with an undisturbed one.

    Half of the kills come before a change to the disk, spread over all changes; half after a
    random time, so in the midst of a write too. Of every three trials one is killed twice.

    Args:
        job: input.
        kills: of each command.
        commands: names in the table.
    """
    things = make_things(job.work)
    picks = random.Random(0)
    for name in commands:
        num_changes = len(things.ended[name].changes)
        survived, misses = 0, []
        for number in range(kills):
            trial = job.work / "trial"
            command = things.start(name, trial)
            if number % 2:
                _kill_after_a_time(command, trial, things.ended[name].seconds, picks)
            else:
                _kill_at(command, trial, 1 + number * (num_changes - 1) // max(1, kills - 1))
            if number % 3 == 2:
                _kill_at(command, trial, picks.randint(1, num_changes))
            wrong = _finish(things, name, trial)
            survived += not wrong
            misses += [{"kill": number, "wrong": wrong}] if wrong else []
            shutil.rmtree(trial)
        job.report(
            f"trust.kills.{name}",
            survived,
            f"of {kills}, to the bit",
            at_least=kills,
            changes_to_the_disk=num_changes,
            misses=misses,
        )


def _kill_at(command: Command, trial: Path, change: int) -> None:
    call(command.words, cwd=trial, limits=Limits(kill_at=change))


def _kill_after_a_time(
    command: Command, trial: Path, longest_s: float, picks: random.Random
) -> None:
    """Kill it once; of a run that ended before, the folder is made again."""
    copy = trial.with_name("untouched")
    shutil.copytree(trial, copy, symlinks=True)
    for _ in range(_TRIES):
        ended = call(
            command.words, cwd=trial, limits=Limits(kill_after_s=picks.uniform(0.02, longest_s))
        )
        if ended.was_killed:
            break
        longest_s = min(longest_s, ended.seconds)  # the first of all had to start the server
        shutil.rmtree(trial)
        shutil.copytree(copy, trial, symlinks=True)
    shutil.rmtree(copy)


def _finish(things: Things, name: str, trial: Path) -> dict[str, Any]:
    """Run the command to its end and return what is wrong then; nothing if all is as it was."""
    ended = call(COMMANDS[name].words, cwd=trial)
    return what_is_wrong(things, name, trial, ended)
