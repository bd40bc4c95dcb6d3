"""Write files and folders atomically: each is whole under its name, or not there.

Content is written beside the final name, flushed to the disk, and renamed. A kill leaves at most
a hidden `.partial` file or folder, or a `.replaced` folder that `recover_folder` puts back.

Folders are shared, so nothing in one is trusted to be what its name says. Reading and writing
"below" a root opens regular files only, and follows no link beneath the root: a link, pipe or
device in a stranger's folder raises UnsafePathError. The root itself is named by the user and may
be a link.
"""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from carryon.cache.errors import DiskFullError, UnsafePathError

PARTIAL = ".partial"
REPLACED = ".replaced"
_SYNC_THREADS = 16
_FULL = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk is full", "free some space"),
    errno.EFBIG: ("the limit on the size of a file is reached", "raise it (ulimit -f)"),
}
"""What an `errno` says, and what to do."""
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFREG: "a file",
}


def open_below(root: Path, path: str, *, flags: int = os.O_RDONLY) -> int:
    """Return the handle of a regular file, opened without following links below `root`.

    Args:
        root: folder that the user named.
        path: of the file, relative to it; in normal form.
        flags: of `os.open`.

    Raises:
        FileNotFoundError: there is no such file.
        UnsafePathError: it, or a folder on the way, is something else.
    """
    whole = f"{root}{os.sep}{path}"  # texts: pathlib would take most of the time of opening
    _refuse_links(str(root), path.split("/")[:-1])
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        handle = os.open(whole, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENOTDIR):
            raise _unsafe(whole, "a file") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise _unsafe(whole, "a file")
    return handle


def open_file_below(root: Path, path: str) -> BufferedReader:
    """Return a regular file opened for reading; errors as of `open_below`."""
    return os.fdopen(open_below(root, path), "rb")


def read_below(root: Path, path: str, *, max_bytes: int | None = None) -> bytes:
    """Return the content of a regular file; errors as of `open_below`.

    Raises:
        UnsafePathError: also if it is larger than `max_bytes`; nothing of it is read.
    """
    with os.fdopen(open_below(root, path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size > max_bytes:
            raise UnsafePathError(f"{root / path}: expected at most {max_bytes} bytes, got {size}")
        return file.readall()


def stat_below(root: Path, path: str) -> os.stat_result:
    """Return the facts of a regular file without opening it; errors as of `open_below`."""
    whole = f"{root}{os.sep}{path}"
    _refuse_links(str(root), path.split("/")[:-1])
    try:
        facts = os.lstat(whole)
    except NotADirectoryError as error:
        raise _unsafe(whole, "a file") from error
    if not stat.S_ISREG(facts.st_mode):
        raise _unsafe(whole, "a file")
    return facts


def names_below(root: Path, path: str) -> list[str]:
    """Return the names in a folder below `root`; none if it is missing.

    Raises:
        UnsafePathError: it, or a folder on the way, is something else.
    """
    folder = root / path
    refuse_links(root, folder)
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise _unsafe(folder, "a folder") from error


def refuse_links(root: Path, folder: Path) -> None:
    """Check that `folder`, and each folder between it and `root`, is a folder or missing.

    Raises:
        UnsafePathError: one is a link or a file.
    """
    _refuse_links(str(root), folder.relative_to(root).parts)


def _refuse_links(root: str, parts: Sequence[str]) -> None:
    if ".." in parts:
        raise UnsafePathError(f"{root}: expected a folder below it, got {'/'.join(parts)}")
    way = root
    for part in parts:
        way = f"{way}{os.sep}{part}"
        try:
            mode = os.lstat(way).st_mode
        except FileNotFoundError:
            return
        except NotADirectoryError as error:  # `root` is a file
            raise _unsafe(os.path.dirname(way), "a folder") from error
        if not stat.S_ISDIR(mode):
            raise _unsafe(way, "a folder")


def _unsafe(path: str | Path, expected: str) -> UnsafePathError:
    try:
        kind = _KINDS.get(stat.S_IFMT(os.lstat(path).st_mode), "a device or socket")
    except OSError:
        kind = "a path through a file"
    return UnsafePathError(
        f"{path}: expected {expected}, got {kind}", fix="put a copy of the original file there"
    )


def parse_json(content: bytes | str) -> Any:  # noqa: ANN401
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or has NaN or Infinity.
    """
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"expected finite numbers, got {name}")


def write_file(
    path: Path,
    content: bytes | bytearray | memoryview,
    *,
    is_synced: bool = True,
    root: Path | None = None,
) -> None:
    """Write `content` to `path`, replacing what was there; folders are made.

    A link at `path` is replaced, not followed. With `is_synced=False` the caller flushes the file
    later: `sync_below`, or `whole_folder`.

    Args:
        path: of the file.
        content: of the file.
        is_synced: flush file and folder to the disk.
        root: folder above it below which no folder may be a link.

    Raises:
        DiskFullError: no space left; nothing of this file remains.
        UnsafePathError: there is a folder at `path`, or a link among the folders below `root`.
    """
    with whole_file(path, is_synced=is_synced, root=root) as partial:
        partial.write_bytes(content)


@contextmanager
def whole_file(path: Path, *, is_synced: bool = True, root: Path | None = None) -> Iterator[Path]:
    """Yield where to write a file; at the end of the block it becomes `path`.

    Arguments and errors are those of `write_file`.
    """
    if root is not None:
        refuse_links(root, path.parent)
    if path.is_dir() and not path.is_symlink():
        raise _unsafe(path, "a file")
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    with disk_full_named(path):
        _make_folder(path.parent, is_synced=is_synced)
        _remove(partial)  # of a killed process with this number; or a planted link
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


def write_json(
    path: Path, document: dict[str, Any], *, is_synced: bool = True, root: Path | None = None
) -> bytes:
    """Write `document` in its one canonical form and return the bytes; see `write_file`."""
    content = json_bytes(document)
    write_file(path, content, is_synced=is_synced, root=root)
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
    _remove(partial)
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
            if _aside(path).is_symlink():
                _remove(_aside(path))
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
    if aside.is_symlink() or not aside.is_dir():
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


def _remove(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)


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
    """Append one JSON line to `path`, a regular file; a kill afterwards does not lose it."""
    with disk_full_named(path):
        handle = open_below(path.parent, path.name, flags=os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines of `path` up to one cut off by a kill; none where there is no file.

    Raises:
        UnsafePathError: it is no regular file.
    """
    try:
        content = read_below(path.parent, path.name)
    except FileNotFoundError:
        return []
    lines = []
    for text in content.splitlines():
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError):
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
