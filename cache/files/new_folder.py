"""Check, before long work, that a result can become a new folder of the name that is given."""

import errno
from pathlib import Path

from carryon.cache.errors import InputError
from carryon.cache.files.atomic import one_writer, recover_folder, whole_folder


def replaceable(out: Path, *, name: str) -> Path:
    """Return the folder to write, links followed, after checking that a new one can take its name.

    Args:
        out: as the user gave it.
        name: of a folder within it, for the fix of an error.

    Raises:
        InputError: it is not empty, or a mount point.
    """
    target = out.resolve()
    if target.parent.is_dir():
        with one_writer(target):
            recover_folder(target)
    if not target.exists():
        return target
    refuse_content(target, out)
    try:
        with whole_folder(target):
            pass
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV):
            raise
        raise InputError(
            f"{out}: expected a new or empty folder, got a mount point, which cannot be replaced. "
            f"Fix: --out {out / name}"
        ) from error
    return target


def refuse_content(target: Path, out: str | Path) -> None:
    """Check that there is nothing at `target`, or an empty folder.

    Raises:
        InputError: there is something else; named `out`, as the user gave it.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{out}: expected a new or empty folder, got one that is not empty")
