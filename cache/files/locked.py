"""A lock file held by one process, which the operating system drops with the process."""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from carryon.cache.errors import InputError, StoreBusyError
from carryon.cache.files.full_disk import disk_full_named

_LOOKS = 100
"""One second in all."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_MAX_BYTES = 20
"""Of the number of a process."""


@contextmanager
def held(path: Path, *, of: Path, kind: str) -> Iterator[None]:
    """Hold the lock file `path`, which is made with its folder and removed at the end.

    Args:
        path: of the lock; it holds the number of the process.
        of: what is locked, for errors.
        kind: of it, for errors.

    Raises:
        InputError: `of` or the lock is something else; nothing was changed.
        StoreBusyError: another process holds the lock; nothing was changed.
        DiskFullError: no space left for the lock.
    """
    handle = _locked(path, of, kind)
    try:
        sign(handle, path)
        yield
    finally:
        if _is_at(path, handle):
            path.unlink(missing_ok=True)  # still held: `_locked` notices a removed file
        os.close(handle)


def take(handle: int, of: Path, *, kind: str, is_shared: bool = False) -> None:
    """Lock an open file, which is empty or holds the number of the process that has or had it.

    Args:
        handle: of the file.
        of: what is locked, for errors.
        kind: of it, for errors.
        is_shared: let others have it too that share it. Where the file system knows no locks,
            nothing is locked.

    Raises:
        InputError: it holds something else, and may be any file by a hard link.
        StoreBusyError: another process has it.
    """
    tries = _LOOKS if is_shared else 1  # one that only looks whether it is free has it a moment
    while tries:
        tries -= 1
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            break
        except OSError as error:
            if is_shared and error.errno in _NO_LOCKS:
                break
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            if tries:
                time.sleep(0.01)
                continue
            holder = _read_holder(handle) or "unknown"
            raise StoreBusyError(
                f"{of}: process {holder} is writing to this {kind}. Fix: wait for it, or stop it"
            ) from error
    content = os.pread(handle, _MAX_BYTES + 1, 0)
    if content and not _is_number(content):
        raise InputError(
            f"{of}: expected a lock with the number of a process, got another file under its "
            "name. Fix: remove it"
        )


def sign(handle: int, path: Path) -> None:
    """Write the number of this process to a lock that it has taken.

    Raises:
        DiskFullError: no space left for it.
    """
    with disk_full_named(path):
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode("ascii"), 0)


def _read_holder(handle: int) -> str:
    """Return the number of the process that holds a lock, which it writes just after taking it."""
    for _ in range(_LOOKS):
        if holder := os.pread(handle, _MAX_BYTES + 1, 0):
            return holder.decode("ascii") if _is_number(holder) else ""
        time.sleep(0.01)
    return ""


def _is_number(content: bytes) -> bool:
    return len(content) <= _MAX_BYTES and content.isdigit()


def _locked(path: Path, of: Path, kind: str) -> int:
    """Return the handle of the locked file that lies at `path`."""
    tries = 100
    while True:
        try:
            with disk_full_named(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError as error:  # removed by the process that made it; or leads nowhere
            tries -= 1
            if not tries:
                raise InputError(
                    f"{of}: expected a folder for the {kind}, got a place where none can be made: "
                    f"{error.strerror} ({error.filename}). Fix: give another folder"
                ) from error
            continue
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(f"{of}: expected a folder for the {kind}, got a file") from error
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR):
                raise
            raise _not_a_lock(path) from error
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise _not_a_lock(path)
            take(handle, of, kind=kind)
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
