"""The folder in a store that an engine writes files of states to, while an extraction runs."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from carryon.cache.errors import DamagedStoreError
from carryon.cache.files.atomic import remove_anything
from carryon.cache.files.regular import names_below, open_below
from carryon.cache.lock import LOCK_PATH

_BESIDE = str(Path(LOCK_PATH).parent)
_STAGING = ".states-"
"""Beginning of the name of such a folder."""
_OWNER = ".owner"
"""File in it whose lock its owner holds. A lock on the folder itself is known to one node alone:
file systems of a network pass on those of files."""


@contextmanager
def staging_folder(root: Path) -> Iterator[Path]:
    """Yield a new folder in a store, removed at the end; those of killed processes go too.

    The caller holds the write lock of the store, or the lease on its plan: of several processes
    one at a time makes such a folder. Its owner holds a lock, which ends with the process.
    """
    for name in names_below(root, _BESIDE):
        if name.startswith(_STAGING):
            _remove_left(root, f"{_BESIDE}/{name}")
    folder = Path(mkdtemp(prefix=_STAGING, dir=root / _BESIDE)).absolute()
    handle = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with suppress(OSError):  # a file system without locks: nobody removes it
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(handle)
        remove_anything(folder)


def _remove_left(root: Path, path: str) -> None:
    """Remove a folder whose owner has ended; one of whose owner nothing is known is kept."""
    try:
        handle = open_below(root, f"{path}/{_OWNER}", flags=os.O_RDWR)
    except FileNotFoundError:  # killed before it had one
        with suppress(OSError):
            (root / path).rmdir()
        return
    except (OSError, DamagedStoreError):  # of another user; or something else
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held; or a file system that has no such locks
        return
    finally:
        os.close(handle)
    remove_anything(root / path)
