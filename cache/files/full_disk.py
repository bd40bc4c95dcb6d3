"""Errors that say 'no space left', of Python or a library: one error that names the place."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from carryon.cache.errors import DiskFullError

_FULL = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk is full", "free some space"),
    errno.EFBIG: ("the limit on the size of a file is reached", "raise it (ulimit -f)"),
}
"""What an `errno` says, and what to do."""


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Turn 'no space left', of Python or a library, into a DiskFullError that names `path`."""
    try:
        yield
    except Exception as error:
        number = disk_full_number(error)
        if number is None:
            raise
        problem, fix = _FULL[number]
        raise DiskFullError(
            number,
            f"{problem} while writing {path}: what was finished is kept; "
            f"{fix} and run the same command again",
        ) from error


def disk_full_number(error: Exception) -> int | None:
    """Return the `errno` of an error that says 'no space left', or None.

    Libraries in other languages only tell it in their text: safetensors `(os error 28)`, Arrow
    `[errno 28]`.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None:
        found = re.search(r"\b(?:os error|errno) (\d+)\b", str(error))
        number = int(found[1]) if found else None
    return number if number in _FULL else None


def what_is_full(error: Exception) -> str | None:
    """Return what an error that says 'no space left' means, or None."""
    number = disk_full_number(error)
    return None if number is None else _FULL[number][0]
