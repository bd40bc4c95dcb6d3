"""Commands killed at any instant: the same command again ends with the same bits."""

import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from carryon.tools.bench.job import Job
from carryon.tools.bench.trust.calls import Limits, call
from carryon.tools.bench.trust.table import (
    COMMANDS,
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
            limits = (
                _after_times(things.ended[name].seconds, picks)
                if number % 2
                else _at_changes(1 + number * (num_changes - 1) // max(1, kills - 1))
            )
            if not kill(things, name, trial, limits):
                misses.append({"kill": number, "wrong": "each kill lay behind the command's end"})
                continue
            words = COMMANDS[name].words
            if number % 3 == 2:  # again, if the rest of the work takes that many changes
                call(words, cwd=trial, limits=Limits(kill_at=picks.randint(1, num_changes)))
            wrong = what_is_wrong(things, name, trial, call(words, cwd=trial))
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


def kill(things: Things, name: str, trial: Path, limits: Iterable[Limits]) -> bool:
    """Make a trial whose command was killed by the first limits before its end; tell if one was.

    The first undisturbed command of all takes longer and changes more, as it fills caches.
    """
    for each in limits:
        words = things.start(name, trial).words
        if call(words, cwd=trial, limits=each).was_killed:
            return True
        shutil.rmtree(trial)
    return False


def _at_changes(change: int) -> Iterator[Limits]:
    for _ in range(_TRIES):
        yield Limits(kill_at=change)
        change = max(1, change * 9 // 10)


def _after_times(longest_s: float, picks: random.Random) -> Iterator[Limits]:
    for _ in range(_TRIES):
        yield Limits(kill_after_s=picks.uniform(0.02, longest_s))
        longest_s = max(0.1, longest_s * 0.8)
