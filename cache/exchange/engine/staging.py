"""The folder in a store that an engine writes files of states to, while an extraction runs."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from carryon.cache.files.atomic import remove_anything
from carryon.cache.files.regular import names_below
from carryon.cache.lock import LOCK_PATH

_BESIDE = str(Path(LOCK_PATH).parent)
_STAGING = ".states-"
"""Beginning of the name of such a folder."""


@contextmanager
def staging_folder(root: Path) -> Iterator[Path]:
    """Yield a new folder in a store, removed at the end; those of killed processes go too.

    Its owner holds a lock on it, which ends with the process.
    """
    for name in names_below(root, _BESIDE):
        if name.startswith(_STAGING) and _is_left(root / _BESIDE / name):
            remove_anything(root / _BESIDE / name)
    folder = Path(mkdtemp(prefix=_STAGING, dir=root / _BESIDE)).absolute()
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield folder
    finally:
        os.close(handle)
        remove_anything(folder)


def _is_left(folder: Path) -> bool:
    """Return whether no process holds the lock of a folder; false where that is unknown."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held; or a file system that has no such locks
        return False
    finally:
        os.close(handle)
    return True
