"""Files that are either whole or not there.

A file is written beside its final name, flushed to the disk, and renamed. A kill leaves at most a
`.partial` file, which `sweep_partials` removes.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from carryon.cache.errors import DiskFullError

PARTIAL = ".partial"


def write_file(
    path: Path, content: bytes | bytearray | memoryview, *, is_synced: bool = True
) -> None:
    """Write `content` to `path`, replacing what was there; folders are made.

    With `is_synced=False` the bytes may still be on their way to the disk: for many files that
    one `os.sync()` before the commit covers.

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


def write_json(path: Path, document: dict[str, Any]) -> bytes:
    """Write `document` in its one canonical form and return the bytes."""
    content = json_bytes(document)
    write_file(path, content)
    return content


def json_bytes(document: dict[str, Any]) -> bytes:
    """Return the canonical bytes of a JSON document: sorted keys, indent 1, ASCII, newline."""
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode("ascii")


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Turn 'no space left' into a DiskFullError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            errno.ENOSPC,
            f"the disk is full while writing {path}: what was finished is kept; "
            "free some space and run the same command again",
        ) from error


def sweep_partials(root: Path) -> int:
    """Remove what killed writers left behind below `root`; returns the number of files."""
    leftovers = [path for path in root.rglob(f".*{PARTIAL}") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


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


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end of the block it becomes `path`.

    What stood at `path` before is replaced. If the block raises, `path` is as it was.

    Raises:
        DiskFullError: no space left; nothing of the new folder remains.
    """
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    with disk_full_named(path):
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in partial.iterdir():
                _flush(file)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
        _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one line to `path`; a kill afterwards does not take it back."""
    with disk_full_named(path), path.open("a", encoding="ascii") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `path`; none where there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="ascii").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
