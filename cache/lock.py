"""One writer per folder: a file lock that the operating system drops with the process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from carryon.cache.errors import InputError
from carryon.cache.files.full_disk import disk_full_named
from carryon.cache.files.locked import held, sign, take
from carryon.cache.files.regular import open_below, refuse_links

LOCK_PATH = "units/.lock"
"""Beside the receipts: zarr-python warns of files it does not know, but not inside an array."""
FOLDER_LOCK = ".lock"
"""In the folder of a run, a sweep or a lineage while a process writes there."""


def refuse_busy(root: Path, *, is_shared: bool = False) -> None:
    """Check, before other work, that no process writes to `root`; nothing is changed.

    Args:
        root: of the store.
        is_shared: allow processes that share the store, as of `write_lock`.

    Raises:
        StoreBusyError: another process holds the lock.
        UnsafePathError: the lock is no regular file, or lies behind a link.
    """
    try:
        handle = open_below(root, LOCK_PATH, flags=os.O_RDWR)
    except OSError:  # no store yet, or a read-only one: `write_lock` raises
        return
    try:
        take(handle, root, kind="store", is_shared=is_shared)
    finally:
        os.close(handle)


@contextmanager
def write_lock(root: Path, *, is_shared: bool = False) -> Iterator[None]:
    """Hold the write lock of the store folder `root`, which is made if it does not exist.

    Args:
        root: of the store.
        is_shared: hold it together with others that share it, and keep out all that do not. What
            they write is up to leases (`carryon.cache.extraction.sharing`).

    Raises:
        StoreBusyError: another process holds it; nothing was changed.
        DiskFullError: no space left for the lock.
        InputError: the lock holds something else, or no folder can be made there; nothing was
            changed.
        UnsafePathError: the lock is no regular file, or lies behind a link; nothing was changed.
    """
    path = root / LOCK_PATH
    with disk_full_named(path):
        refuse_links(root, path.parent)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"{root}: expected a folder for the store, got a place where none can be made: "
                f"{error.strerror} ({error.filename}). Fix: give another folder"
            ) from error
        handle = open_below(root, LOCK_PATH, flags=os.O_RDWR | os.O_CREAT)
    try:
        take(handle, root, kind="store", is_shared=is_shared)
        sign(handle, path)
        yield
        if os.pread(handle, 20, 0) == str(os.getpid()).encode("ascii"):
            os.ftruncate(handle, 0)  # unless another that shares it has signed
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
    try:
        with held(root / FOLDER_LOCK, of=root, kind=kind):
            yield
    finally:
        for folder in made:
            with suppress(OSError):  # no longer empty
                folder.rmdir()
