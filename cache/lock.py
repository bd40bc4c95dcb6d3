"""One writer per folder: a file lock that the operating system drops with the process."""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from carryon.cache.errors import InputError, StoreBusyError
from carryon.cache.files.atomic import disk_full_named
from carryon.cache.files.regular import open_below, refuse_links

LOCK_PATH = "units/.lock"
"""Beside the receipts: zarr-python warns of files it does not know, but not inside an array."""
FOLDER_LOCK = ".lock"
"""In the folder of a run, a sweep or a lineage while a process writes there."""


def refuse_busy(root: Path) -> None:
    """Check, before other work, that no process writes to `root`; nothing is changed.

    Raises:
        StoreBusyError: another process holds the lock.
        UnsafePathError: the lock is no regular file, or lies behind a link.
    """
    try:
        handle = open_below(root, LOCK_PATH, flags=os.O_RDWR)
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
        UnsafePathError: the lock is no regular file, or lies behind a link; nothing was changed.
    """
    path = root / LOCK_PATH
    with disk_full_named(path):
        refuse_links(root, path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open_below(root, LOCK_PATH, flags=os.O_RDWR | os.O_CREAT)
    try:
        _take(handle, root)
        with disk_full_named(path):
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode("ascii"), 0)
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


@contextmanager
def folder_lock(root: Path, *, kind: str) -> Iterator[None]:
    """Hold the write lock of the folder `root`, which is made if it does not exist.

    At the end the lock file is removed, and folders made here that are still empty.

    Args:
        root: of a run, a sweep or a lineage.
        kind: which of them, for errors.

    Raises:
        InputError: `root` or the lock in it is something else.
        StoreBusyError: another process holds the lock; nothing was changed.
        DiskFullError: no space left for the lock.
    """
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    path = root / FOLDER_LOCK
    try:
        handle = _lock_file(root, path, kind)
        try:
            with disk_full_named(path):
                os.ftruncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode("ascii"), 0)
            yield
        finally:
            if _is_at(path, handle):
                path.unlink(missing_ok=True)  # still held: `_lock_file` notices a removed file
            os.close(handle)
    finally:
        for folder in made:
            with suppress(OSError):  # no longer empty
                folder.rmdir()


def _lock_file(root: Path, path: Path, kind: str) -> int:
    """Return the handle of the locked file that lies at `path`."""
    tries = 100
    while True:
        try:
            with disk_full_named(path):
                root.mkdir(parents=True, exist_ok=True)
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # removed by the process that made it; or the path leads nowhere
            tries -= 1
            if not tries:
                raise
            continue
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{root}: expected a folder for the {kind}, got a file") from error
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR):
                raise
            raise _not_a_lock(path) from error
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise _not_a_lock(path)
            _take(handle, root, kind)
            if _is_at(path, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed it between our opening and locking it


def _not_a_lock(path: Path) -> InputError:
    return InputError(f"{path}: expected a regular file, got something else. Fix: remove it")


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _take(handle: int, root: Path, kind: str = "store") -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise StoreBusyError(
            f"{root}: process {holder} is writing to this {kind}. Fix: wait for it, or stop it"
        ) from error
