"""The disk under a measurement: a speed limit, the page cache, the size of a folder."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

Charge = Callable[[int], None]
"""Called with a number of bytes before they are read; returns when the disk has delivered them."""


def charge_nothing(num_bytes: int) -> None:
    """Allow a read without delay."""


_CREDIT_S = 0.02
"""Idle time that may be made up. A sleep ends up to some ms late, which would otherwise penalize
layouts of many small reads."""


class SlowDisk:
    """A simulated disk of limited bandwidth, shared by all threads.

    A reader requests its bytes, waits as long as such a disk would need, and then reads them from
    the page cache. Requests are served in order, without latency and without read-ahead. All
    layouts are charged alike: the size of each file they read, or the bytes they touch of a map.
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


def flush(folder: Path) -> None:
    """Wait until the files below `folder` are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def bring_into_memory(folder: Path) -> None:
    """Read all files below `folder` once, so that the page cache holds them."""
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
