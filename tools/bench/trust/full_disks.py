"""Disks that become full while a command writes: one line, and once there is room the same bits.

The disk is a file system in memory whose size is changed, which needs the right to mount one.
"""

import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.tools.bench.job import Job
from carryon.tools.bench.trust.calls import Ended, Limits, call
from carryon.tools.bench.trust.table import Things, make_things, what_is_wrong

PAGE = 4096
"""Bytes of a small file on such a disk."""
_ROOM = 1 << 27
_FULL = ("the disk is full", "the limit on the size of a file")
_TABLE = ("extract", "append", "train", "sweep", "update", "merge")


def measure_full_disks(job: Job, *, sizes: int = 20) -> None:
    """Run each command on a disk with too little room, then once more with enough.

    The room goes from one page to one page less than the command needs. Of four sizes one is a
    limit on the size of files instead, as `ulimit -f` sets it.

    Args:
        job: input.
        sizes: of the disk, for each command.

    Raises:
        InputError: this process may mount no file system.
    """
    things = make_things(job.work)
    for name in _TABLE:
        needed, largest = _needed_pages(things, name, job.work)
        stopped, misses = 0, []
        for number in range(sizes):
            part = (number + 1) / (sizes + 1)
            if number % 4 == 3:
                limits = Limits(file_bytes=max(1, int(largest * part)))
                pages = _ROOM // PAGE
            else:
                limits, pages = Limits(), max(1, math.floor(needed * part))
            wrong = fill(things, name, job.work, pages=pages, limits=limits)
            stopped += not wrong
            misses += [{"pages": pages, "wrong": wrong}] if wrong else []
        job.report(
            f"trust.full_disk.{name}",
            stopped,
            f"of {sizes}: one line, then the same bits",
            at_least=sizes,
            kilobytes_needed=needed * PAGE // 1024,
            misses=misses,
        )


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a disk at `folder`, with room until `resize` takes it.

    Raises:
        InputError: this process may mount no file system.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={_ROOM}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(
            f"a disk of a chosen size: expected the right to mount one, got {done.stderr.strip()}. "
            "Fix: run as root, or in unshare --user --map-root-user --mount"
        )
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, num_bytes: int) -> None:
    """Change the size of a disk; not below what is used."""
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(disk)], check=True)


def pages_used(disk: Path) -> int:
    """Return the pages in use on a disk."""
    status = os.statvfs(disk)
    return status.f_blocks - status.f_bfree


def _needed_pages(things: Things, name: str, work: Path) -> tuple[int, int]:
    """Return the pages that a command leaves in use, and the bytes of its largest new file."""
    with small_disk(work / "disk") as disk:
        command = things.start(name, disk / "trial")
        before, there = pages_used(disk), set((disk / "trial").rglob("*"))
        ended = call(command.words, cwd=disk / "trial", own=_own(work))
        assert ended.code == 0, ended.err
        files = [path for path in (disk / "trial" / command.out).rglob("*") if path.is_file()]
        files = [path for path in files if path not in there]
        return pages_used(disk) - before, max(path.stat().st_size for path in files)


def fill(things: Things, name: str, work: Path, *, pages: int, limits: Limits) -> dict[str, Any]:
    """Return what is wrong after a command met a full disk and was run again; else nothing."""
    with small_disk(work / "disk") as disk:
        trial = disk / "trial"
        words = things.start(name, trial).words
        resize(disk, (pages_used(disk) + pages) * PAGE)
        ended = call(words, cwd=trial, own=_own(work), limits=limits)
        wrong: dict[str, Any] = {} if _is_named(ended) else {"full": ended.err[-500:] or "no error"}
        resize(disk, _ROOM)
        again = call(words, cwd=trial, own=_own(work))
        return wrong | what_is_wrong(things, name, trial, again)


def _is_named(ended: Ended) -> bool:
    return ended.is_refusal and any(text in ended.last_line for text in _FULL)


def _own(work: Path) -> Path:
    """Return an empty folder for what is not the command's result, on another disk."""
    own = work / "own"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    return own
