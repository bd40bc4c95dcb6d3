"""Places that a command writes to, checked before the work that fills them."""

from pathlib import Path

from carryon.cache.errors import CarryOnError, InputError
from carryon.cache.files.atomic import write_file


def check_folder(path: str, *, name: str) -> None:
    """Check that a folder is at `path` or can be made there; nothing is made.

    Raises:
        InputError: a file is in its way; `name` is the option.
    """
    there = next(each for each in (Path(path), *Path(path).absolute().parents) if each.exists())
    if not there.is_dir():
        raise InputError(f"{name}: expected a folder, got the file {there}. Fix: another {name}")


def check_page(path: str, *, name: str) -> None:
    """Check that a page can be written to `path`, and make its folder.

    Raises:
        InputError: there is a folder, or no folder can be made; `name` is the option.
    """
    if not path or Path(path).is_dir():
        got = f"the folder {path}" if path else "nothing"
        raise InputError(f"{name}: expected a file for the page, got {got}")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refusal(path, error, name=name) from error


def write_page(path: str, page: str, *, name: str) -> None:
    """Write a page.

    Raises:
        InputError: nothing can be written there.
        DiskFullError: no space left.
    """
    try:
        write_file(Path(path), page.encode())
    except CarryOnError:
        raise
    except OSError as error:
        raise _refusal(path, error, name=name) from error


def _refusal(path: str, error: OSError, *, name: str) -> InputError:
    return InputError(
        f"{name}: expected a place for a file, got {path}: {error.strerror}. Fix: another {name}"
    )
