"""One writer per store: a file lock that the operating system drops with the process."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from carryon.cache.errors import StoreBusyError
from carryon.cache.files import disk_full_named

LOCK_PATH = "units/.lock"
"""Beside the receipts: zarr-python warns of files it does not know, but not inside an array."""


def refuse_busy(root: Path) -> None:
    """Check, before other work, that no process writes to `root`; nothing is changed.

    Raises:
        StoreBusyError: another process holds the lock.
    """
    try:
        handle = os.open(root / LOCK_PATH, os.O_RDWR)
    except OSError:  # no store yet, or a read-only one: `write_lock` raises
        return
    try:
        _take(handle, root)
    finally:
        os.close(handle)


@contextmanager
def write_lock(root: Path) -> Iterator[None]:
    """Hold the write lock of the store folder `root`, which is made if it does not exist.

    Raises:
        StoreBusyError: another process holds it; nothing was changed.
        DiskFullError: no space left for the lock.
    """
    path = root / LOCK_PATH
    with disk_full_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _take(handle, root)
        with disk_full_named(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode("ascii"), 0)
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _take(handle: int, root: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise StoreBusyError(
            f"{root}: process {holder} is writing to this store. Fix: wait for it, or stop it"
        ) from error
