"""Two writers at one folder: one does the work, the other is refused, nothing is lost."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carryon.tools.bench.job import Job
from carryon.tools.bench.trust.calls import Call, Ended, Limits
from carryon.tools.bench.trust.table import COMMANDS, Things, make_things, what_is_wrong

FOLDERS = {"run": "train", "lineage": "update", "store": "extract", "carry-on": "merge"}
"""What is written to -> the command of the table; a merged carry-on is a folder like its parts."""


NO_RACE = "the first had ended before the second began"
"""Of a command that may be given twice: it says that all is done."""
_TRIES = 10


def measure_writers(job: Job, *, pairs: int = 40) -> None:
    """Start a command twice in one folder; the first waits in the midst of its work, or races.

    Args:
        job: input.
        pairs: over all kinds of folders.
    """
    things = make_things(job.work)
    picks = random.Random(0)
    each = -(-pairs // len(FOLDERS))
    right, misses = 0, []
    for kind, name in FOLDERS.items():
        for number in range(each):
            trial = job.work / "trial"
            changes = things.ended[name].changes
            first_held = first_change_under_lock(changes)
            pause_at = picks.randint(first_held, len(changes)) if number % 2 else 0
            wrong = start_both(things, name, trial, pause_at=pause_at)
            tries = 1
            while wrong.get("ended") == NO_RACE and tries < _TRIES:
                shutil.rmtree(trial)
                wrong = start_both(things, name, trial, pause_at=pause_at)
                tries += 1
            right += not wrong
            misses += [{"folder": kind, "pause_at": pause_at, "wrong": wrong}] if wrong else []
            shutil.rmtree(trial)
    total = each * len(FOLDERS)
    job.report("trust.writers", right, f"of {total}", at_least=total, misses=misses)


def first_change_under_lock(changes: Sequence[str]) -> int:
    """Return the number of the first change to the disk after the lock was taken."""
    return 2 + next(number for number, text in enumerate(changes, 1) if ".lock" in text)


def start_both(things: Things, name: str, trial: Path, *, pause_at: int) -> dict[str, Any]:
    """Start a command twice in one folder and return what is wrong then; else nothing.

    Args:
        things: of the undisturbed command.
        name: of the command.
        trial: folder to make.
        pause_at: the second runs while the first waits at this change to the disk. 0: they race.
    """
    command = things.start(name, trial)
    owns = [trial.with_name(f"own-{number}") for number in range(2)]
    first = Call(command.words, cwd=trial, own=owns[0], limits=Limits(pause_at=pause_at))
    is_held = bool(pause_at) and first.wait_for_pause()
    second = Call(command.words, cwd=trial, own=owns[1])
    if is_held:
        ended = [second.wait()]
        first.go_on()
        ended.insert(0, first.wait())
    else:
        ended = [first.wait(), second.wait()]
    for own in owns:
        shutil.rmtree(own)
    done = [each for each in ended if each.code == 0]
    wrong: dict[str, Any] = {}
    if len(done) == len(ended) and COMMANDS[name].codes == {0}:
        wrong["ended"] = NO_RACE
    elif not _is_right(ended, [first.pid, second.pid], is_held=is_held):
        wrong["ended"] = [f"code {each.code}: {each.last_line[-300:]}" for each in ended]
    if done:
        wrong |= what_is_wrong(things, name, trial, done[0])
    return wrong


def _is_right(ended: Sequence[Ended], pids: Sequence[int], *, is_held: bool) -> bool:
    """Tell whether one did the work and the other was refused, by the number of the process.

    Once the result has its name, the other may name that instead.
    """
    done = [number for number, each in enumerate(ended) if each.code == 0]
    refused = [each for each in ended if each.is_refusal]
    if len(done) != 1 or len(refused) != 1 or (is_held and done != [0]):
        return False
    is_busy = f"process {pids[done[0]]} is writing to this" in refused[0].last_line
    return is_busy or "not empty" in refused[0].last_line
