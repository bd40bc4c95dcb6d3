"""The disk below a measurement: what lies on it, pushed out of memory, or slowed down."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

Charge = Callable[[int], None]
"""Called with the number of bytes before they are read; returns when the disk would have them."""


def charge_nothing(num_bytes: int) -> None:
    """Let a read through at once."""


_CREDIT_S = 0.02
"""A sleep ends late by up to some ms. So much idle time may be made up for, or layouts of many
small reads would pay for the clock instead of the disk."""


class SlowDisk:
    """A disk that gives so many bytes a second, to all threads together, and no more.

    It stands in front of files that are in memory: a reader asks for its bytes and waits as long
    as such a disk would take, then reads them. Requests are served one after another, without
    latency and without reading ahead of what is asked for. Its users are charged alike: the size
    of each file that they read, and of a map the bytes that they touch.
    """

    def __init__(self, bytes_per_second: float) -> None:
        """Begin idle, without credit."""
        self._bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._is_free_at = time.perf_counter()

    def charge(self, num_bytes: int) -> None:
        """Wait until the disk has served `num_bytes` more."""
        with self._lock:
            begins_at = max(time.perf_counter() - _CREDIT_S, self._is_free_at)
            self._is_free_at = ends_at = begins_at + num_bytes / self._bytes_per_second
        time.sleep(max(0.0, ends_at - time.perf_counter()))


def drop_from_memory(folder: Path) -> bool:
    """Push the files below `folder` to the disk and out of the page cache.

    A virtual disk may still have them in a cache of its host, so what follows is cold at best.

    Returns:
        False where the system has no call for it; nothing was done.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
    return True


def bring_into_memory(folder: Path) -> None:
    """Read the files below `folder` once: the system may have dropped them since they were used."""
    buffer = bytearray(1 << 20)
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def measure_folder(folder: Path) -> tuple[int, int]:
    """Return the number of files below `folder` and their bytes."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)
