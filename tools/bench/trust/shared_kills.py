"""Processes that extract into one store, killed at random moments: complete, and equal content."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

from carryon.cache.optional import require
from carryon.tools.bench.job import Job
from carryon.tools.bench.trust.calls import Call, Ended, Limits, call
from carryon.tools.bench.trust.table import COMMANDS, Things, make_things, what_is_wrong

WORDS = [*COMMANDS["extract"].words, "--workers", "1"]
RAY_WORDS = [*COMMANDS["extract"].words, "--backend", "ray", "--workers", "2"]
_LOOK_S = 0.02


def measure_shared_kills(job: Job, *, kills: int = 30) -> None:
    """Kill workers, and drivers and actors of Ray, in turn; compare with one process.

    Of workers, two are started at once. Half of their kills come before a random change to the
    disk, half after a random time; in every third trial both are killed, and the command is run
    again. A driver is killed after a random time, and the command is run again. One of two actors
    is killed at a random time of its life; the command goes on.

    Args:
        job: input.
        kills: trials.
    """
    require("ray", extra="ray", purpose="the benchmark trust.shared_kills")
    things = make_things(job.work)
    picks = random.Random(0)
    trial = job.work / "trial"
    things.start("extract", trial)
    undisturbed = call(WORDS, cwd=trial)
    shutil.rmtree(trial)
    things.start("extract", trial)
    driver = Call(RAY_WORDS, cwd=trial)
    waited_at = time.perf_counter()
    _wait_for_actors(driver, trial)
    actors_at = time.perf_counter()
    with_ray = driver.wait()
    actors_s = time.perf_counter() - actors_at
    assert with_ray.code == 0, with_ray.err
    shutil.rmtree(trial)
    survived, misses = 0, []
    killed = dict.fromkeys(("worker", "driver", "actor"), 0)
    for number in range(kills):
        kind, turn = list(killed)[number % 3], number // 3
        if kind == "worker":
            limits = Limits(kill_at=picks.randint(1, len(undisturbed.changes)))
            if turn % 2:
                limits = Limits(kill_after_s=picks.uniform(0.01, undisturbed.seconds))
            was_killed, wrong = kill_one(things, trial, limits, is_again=turn % 3 == 2)
        elif kind == "driver":
            after_s = picks.uniform(0.01, with_ray.seconds)
            was_killed, wrong = kill_driver(things, trial, after_s)
        else:
            was_killed, wrong = kill_actor(things, trial, picks.uniform(0.0, actors_s))
        killed[kind] += was_killed
        survived += not wrong
        misses += [{"kill": number, "of": kind, "wrong": wrong}] if wrong else []
        shutil.rmtree(trial)
    job.report(
        "trust.shared_kills",
        survived,
        f"of {kills}, to the bit",
        at_least=kills,
        killed_before_the_end=killed,
        seconds_to_actors=actors_at - waited_at,
        misses=misses,
    )


def kill_driver(things: Things, trial: Path, after_s: float) -> tuple[bool, dict[str, object]]:
    """Kill the command that started Ray, and run it again; results as of `kill_one`."""
    things.start("extract", trial)
    first = call(RAY_WORDS, cwd=trial, limits=Limits(kill_after_s=after_s))
    ended = call(RAY_WORDS, cwd=trial)
    return first.was_killed, what_is_wrong(things, "extract", trial, ended)


def kill_actor(things: Things, trial: Path, after_s: float) -> tuple[bool, dict[str, object]]:
    """Kill an actor so long after the first has appeared; results as of `kill_one`."""
    things.start("extract", trial)
    driver = Call(RAY_WORDS, cwd=trial)
    _wait_for_actors(driver, trial)
    time.sleep(after_s)
    was_killed = False
    for pid in actors_below(trial)[-1:]:
        try:
            os.kill(pid, signal.SIGKILL)
            was_killed = True
        except ProcessLookupError:
            continue
    ended: Ended = driver.wait()
    return was_killed, what_is_wrong(things, "extract", trial, ended)


def actors_below(trial: Path) -> list[int]:
    """Return the process numbers of the actors of a command that runs in a trial, ascending."""
    home = f"HOME={trial}/home".encode()
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if not (folder / "cmdline").read_bytes().startswith(b"ray::UnitActor"):
                continue
            if home in (folder / "environ").read_bytes().split(b"\0"):
                pids.append(int(folder.name))
        except OSError:
            continue
    return sorted(pids)


def _wait_for_actors(driver: Call, trial: Path) -> None:
    while driver.is_running and not actors_below(trial):
        time.sleep(_LOOK_S)


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
