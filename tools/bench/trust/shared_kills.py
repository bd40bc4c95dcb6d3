"""Processes that extract into one store, killed at random moments: complete, and equal content."""

import random
import shutil
from pathlib import Path

from carryon.tools.bench.job import Job
from carryon.tools.bench.trust.calls import Call, Limits, call
from carryon.tools.bench.trust.table import COMMANDS, Things, make_things, what_is_wrong

WORDS = [*COMMANDS["extract"].words, "--workers", "1"]


def measure_shared_kills(job: Job, *, kills: int = 30) -> None:
    """Start the same extraction twice at once and kill one, or both; compare with one process.

    Half of the kills come before a random change to the disk, half after a random time. Of every
    three trials both processes are killed in one, and the command is run again.

    Args:
        job: input.
        kills: trials.
    """
    things = make_things(job.work)
    picks = random.Random(0)
    trial = job.work / "trial"
    things.start("extract", trial)
    undisturbed = call(WORDS, cwd=trial)
    shutil.rmtree(trial)
    survived, num_killed, misses = 0, 0, []
    for number in range(kills):
        limits = Limits(kill_at=picks.randint(1, len(undisturbed.changes)))
        if number % 2:
            limits = Limits(kill_after_s=picks.uniform(0.01, undisturbed.seconds))
        is_again = number % 3 == 2
        was_killed, wrong = kill_one(things, trial, limits, is_again=is_again)
        num_killed += was_killed
        survived += not wrong
        misses += [{"kill": number, "wrong": wrong}] if wrong else []
        shutil.rmtree(trial)
    job.report(
        "trust.shared_kills",
        survived,
        f"of {kills}, to the bit",
        at_least=kills,
        killed_before_the_end=num_killed,
        misses=misses,
    )


def kill_one(
    things: Things, trial: Path, limits: Limits, *, is_again: bool
) -> tuple[bool, dict[str, object]]:
    """Run one trial; return whether the kill came before the end, and what is wrong.

    Args:
        things: that the command starts from.
        trial: folder to make.
        limits: what kills the first process.
        is_again: kill the second one likewise, and run the command again.
    """
    things.start("extract", trial)
    first = Call(WORDS, cwd=trial, limits=limits)
    second = Call(
        WORDS,
        cwd=trial,
        own=trial.with_name("own"),
        limits=limits if is_again else Limits(),
    )
    was_killed = first.wait().was_killed
    ended = second.wait()
    if is_again:
        ended = call(WORDS, cwd=trial)
    return was_killed, what_is_wrong(things, "extract", trial, ended)
