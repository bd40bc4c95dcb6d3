"""Write files and folders atomically: each is whole under its name, or not there.

Content is written beside the final name, flushed to the disk, and renamed. A kill leaves at most
a hidden `.partial` file or folder, or a `.replaced` folder that `recover_folder` puts back.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from carryon.cache.errors import DiskFullError

PARTIAL = ".partial"
REPLACED = ".replaced"
_SYNC_THREADS = 16
_FULL = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk is full", "free some space"),
    errno.EFBIG: ("the limit on the size of a file is reached", "raise it (ulimit -f)"),
}
"""What an `errno` says, and what to do."""


def write_file(
    path: Path, content: bytes | bytearray | memoryview, *, is_synced: bool = True
) -> None:
    """Write `content` to `path`, replacing what was there; folders are made.

    With `is_synced=False` the caller flushes the file later: `sync_below`, or `whole_folder`.

    Raises:
        DiskFullError: no space left; nothing of this file remains.
    """
    with whole_file(path, is_synced=is_synced) as partial:
        partial.write_bytes(content)


@contextmanager
def whole_file(path: Path, *, is_synced: bool = True) -> Iterator[Path]:
    """Yield where to write a file; at the end of the block it becomes `path`.

    Raises:
        DiskFullError: no space left; nothing of this file remains.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    with disk_full_named(path):
        _make_folder(path.parent, is_synced=is_synced)
        try:
            yield partial
            if is_synced:
                _sync(partial)
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if is_synced:
            _sync(path.parent)  # without this a power cut may forget the rename


def write_json(path: Path, document: dict[str, Any], *, is_synced: bool = True) -> bytes:
    """Write `document` in its one canonical form and return the bytes."""
    content = json_bytes(document)
    write_file(path, content, is_synced=is_synced)
    return content


def json_bytes(document: dict[str, Any]) -> bytes:
    """Return the canonical bytes of a JSON document: sorted keys, indent 1, ASCII, newline."""
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode("ascii")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end of the block it becomes `path`.

    A folder at `path` is replaced: set aside, then removed when the new one has its name. Files in
    the new one need no flushing: all are flushed here. If the block raises, `path` is unchanged.

    Raises:
        DiskFullError: no space left; nothing of the new folder remains.
    """
    recover_folder(path)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    with disk_full_named(path):
        _make_folder(path.parent, is_synced=True)
        partial.mkdir()
        try:
            yield partial
            sync_below(partial, partial.rglob("*"))
            _replace(path, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(path.parent)
    shutil.rmtree(_aside(path), ignore_errors=True)


def _replace(path: Path, partial: Path) -> None:
    while True:
        if path.exists():
            path.rename(_aside(path))
        try:
            partial.rename(path)
            return
        except OSError as error:  # a reader's recover_folder came between the two renames
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def recover_folder(path: Path) -> None:
    """Undo what a kill inside `whole_folder` left half done: afterwards `path` is old or new.

    Call it before looking for a folder that `whole_folder` writes. It costs one look at the disk.
    """
    aside = _aside(path)
    if not aside.is_dir():
        return
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        return
    with suppress(FileNotFoundError):  # another process was faster
        aside.rename(path)


def recover_folders(parent: Path) -> None:
    """Call `recover_folder` for every folder in `parent` that was set aside."""
    for aside in parent.glob(f".*{REPLACED}"):
        recover_folder(parent / aside.name.removeprefix(".").removesuffix(REPLACED))


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{REPLACED}")


def sync_below(root: Path, paths: Iterable[Path]) -> None:
    """Flush files and folders below `root` to the disk, and the folders from `root` to them."""
    files, folders = [], {root.parent}
    for path in paths:
        if path.is_file():
            files.append(path)
        folder = path if path.is_dir() else path.parent
        while folder not in folders:
            folders.add(folder)
            folder = folder.parent
    # One at a time, each would wait for a commit of the file system's journal: 3 ms on ext4.
    with ThreadPoolExecutor(max_workers=_SYNC_THREADS) as pool:
        list(pool.map(_sync, files))
        list(pool.map(_sync, folders - {root.parent}))


def sweep_partials(root: Path) -> int:
    """Remove the `.partial` files of killed writers below `root`; returns their number."""
    leftovers = [path for path in root.rglob(f".*{PARTIAL}") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line to `path`; a kill afterwards does not lose it."""
    with disk_full_named(path), path.open("a", encoding="ascii") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of `path` up to one cut off by a kill; none where there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="ascii").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


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

    Libraries in Rust, such as safetensors, only tell it in their text.
    """
    if isinstance(error, OSError):
        number = error.errno
    else:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
    return number if number in _FULL else None


def _make_folder(folder: Path, *, is_synced: bool) -> None:
    """Make `folder` and its parents; if synced, a power cut does not forget them."""
    if folder.is_dir():
        return
    _make_folder(folder.parent, is_synced=is_synced)
    folder.mkdir(exist_ok=True)
    if is_synced:
        _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
