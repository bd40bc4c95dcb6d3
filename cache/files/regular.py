"""Open regular files only, without following links: for folders that a stranger may have made.

Folders are shared, so nothing in one is trusted to be what its name says. What opens "below" a
root follows no link beneath the root: a link, pipe or device there raises UnsafePathError. The root
itself is named by the user and may be a link.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path

from carryon.cache.errors import DamagedFileError, UnsafePathError

_MAX_DIGESTED_BYTES = 1 << 28
_KINDS = {
    stat.S_IFLNK: "a link",
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
            raise unsafe(whole, "a file") from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise unsafe(whole, "a file")
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
        raise unsafe(whole, "a file") from error
    if not stat.S_ISREG(facts.st_mode):
        raise unsafe(whole, "a file")
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
        raise unsafe(folder, "a folder") from error


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
            raise unsafe(os.path.dirname(way), "a folder") from error
        if not stat.S_ISDIR(mode):
            raise unsafe(way, "a folder")


def unsafe(path: str | Path, expected: str) -> UnsafePathError:
    """Return the error of something else where `expected` was written."""
    try:
        kind = _KINDS.get(stat.S_IFMT(os.lstat(path).st_mode), "a device or socket")
    except OSError:
        kind = "a path through a file"
    return UnsafePathError(
        f"{path}: expected {expected}, got {kind}", fix="put a copy of the original file there"
    )


def open_regular(path: Path) -> BufferedReader:
    """Return a regular file in a folder that the user named, opened for reading.

    Raises:
        DamagedFileError: there is no file, or it is something else.
    """
    try:
        return open_file_below(path.parent, path.name)
    except FileNotFoundError as error:
        raise DamagedFileError(f"{path}: expected a file, found none") from error
    except UnsafePathError as error:
        raise DamagedFileError(error.problem) from error


def digest_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a document or picture; that of weights is `digest_tensors`.

    Raises:
        DamagedFileError: it is no regular file, or so large that hashing it would only cost time.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MAX_DIGESTED_BYTES:
            raise DamagedFileError(
                f"{path}: expected at most {_MAX_DIGESTED_BYTES:,} bytes, got {size:,}"
            )
        return hashlib.file_digest(file, "sha256").hexdigest()
