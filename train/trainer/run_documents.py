"""JSON documents of a run that hold the SHA-256 of their own content, and its JSON lines.

Documents from before digests were recorded have none; they are read without that check.
"""

import io
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import fields
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar, cast

from carryon.cache.errors import InputError
from carryon.cache.files import json_bytes
from carryon.cache.format.manifest import digest_of

T = TypeVar("T")
DIGEST = "sha256"
MAX_BYTES = 64 << 20
"""Of a document. The largest is the state of a checkpoint: a few numbers a weight."""


class DamagedFileError(InputError):
    """A file of a run is not as it was written."""


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with the SHA-256 of its content."""
    return {**document, DIGEST: digest_of(dict(document))}


def read_sealed(path: Path, *, is_digest_required: bool = False) -> dict[str, Any]:
    """Return a document without its digest, which is compared with the content.

    Args:
        path: of the file.
        is_digest_required: refuse a document without a digest.

    Raises:
        DamagedFileError: it is no regular file or not JSON, or the content has changed.
    """
    with open_regular(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DamagedFileError(f"{path}: expected at most {MAX_BYTES:,} bytes, got more")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(
            f"{path}: expected JSON as it was written: {error!s:.200}"
        ) from error
    if not isinstance(document, dict):
        raise DamagedFileError(f"{path}: expected a JSON object, got {type(document).__name__}")
    values = {key: value for key, value in document.items() if key != DIGEST}
    if is_digest_required and DIGEST not in document:
        raise DamagedFileError(f"{path}: expected its SHA-256 in it, got none")
    # The bytes are compared too: in another form a changed byte could leave the values as they are.
    try:
        is_whole = DIGEST not in document or json_bytes(sealed(values)) == content
    except RecursionError as error:  # writing takes more of the stack than reading
        raise DamagedFileError(f"{path}: expected JSON of a few levels, got deeper ones") from error
    if not is_whole:
        raise DamagedFileError(f"{path}: the content differs from its SHA-256")
    return values


def read_values(kind: type[T], path: Path) -> T:
    """Return the instance of a dataclass of plain values that a document holds.

    Raises:
        DamagedFileError: as `read_sealed`, or a value is missing, unknown or of another type.
    """
    values = read_sealed(path)
    try:
        made = kind(**values)
    except TypeError as error:
        raise DamagedFileError(f"{path}: {error!s:.200}") from error
    for item in fields(kind):  # type: ignore[arg-type]
        value, types = getattr(made, item.name), cast("type", item.type)
        is_taken = isinstance(value, types) or (isinstance(value, int) and isinstance(0.0, types))
        if isinstance(value, bool) or not is_taken:  # an int is a float; a bool is no number
            raise DamagedFileError(f"{path}: {item.name}: expected {types}, got {value!a:.80}")
    return made


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; no link is followed.

    Raises:
        DamagedFileError: there is no file, or it is something else.
    """
    try:
        # Without O_NONBLOCK a pipe would wait for a writer.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        raise
    except OSError as error:
        got = "a link" if path.is_symlink() else str(error.strerror)
        raise DamagedFileError(f"{path}: expected a file, got {got}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DamagedFileError(f"{path}: expected a file, got something else")
    return BufferedReader(io.FileIO(handle))


def read_whole_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the JSON lines of a file, and the numbers of damaged lines, counted from 1.

    A last line that a kill cut off is neither. There are none where there is no file.

    Raises:
        DamagedFileError: it is no regular file.
    """
    if not os.path.lexists(path):
        return [], []
    with open_regular(path) as file:
        rows = file.read().split(b"\n")
    lines, damaged = [], []
    for number, row in enumerate(rows[:-1], start=1):
        try:
            line = json.loads(row)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            lines.append(line)
        else:
            damaged.append(number)
    return lines, damaged
