"""What a run keeps in sealed documents and in lines of JSON: values of a dataclass, and lines."""

import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin

from carryon.cache.errors import DamagedFileError
from carryon.cache.files.documents import (
    DIGEST,
    FILES,
    digest_of,
    read_bounded,
    read_sealed,
    sealed,
)
from carryon.cache.files.full_disk import disk_full_named
from carryon.cache.files.regular import open_below

T = TypeVar("T")
_MAX_BYTES = 128 << 20
"""Of lines: those of some hundred thousand evaluations."""


def read_values(kind: type[T], path: Path) -> T:
    """Return the instance of a dataclass of plain values that a document holds.

    Raises:
        DamagedFileError: as `read_sealed`, or a value is missing, unknown or of another type.
    """
    values = read_sealed(path)
    values.pop(FILES, None)
    try:
        made = kind(**values)
    except TypeError as error:
        raise DamagedFileError(f"{path}: {error!s:.200}") from error
    for item in fields(kind):  # type: ignore[arg-type]
        value = getattr(made, item.name)
        types = dict if get_origin(item.type) is dict else cast("type", item.type)
        is_taken = isinstance(value, types) or (isinstance(value, int) and isinstance(0.0, types))
        if isinstance(value, bool) or not is_taken:  # an int is a float; a bool is no number
            raise DamagedFileError(f"{path}: {item.name}: expected {types}, got {value!a:.80}")
    return made


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line with its digest to a regular file; a kill afterwards keeps it."""
    with disk_full_named(path):
        handle = open_below(path.parent, path.name, flags=os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(_text(line))


def lines_bytes(lines: Iterable[dict[str, Any]]) -> bytes:
    """Return the content of a file of lines, each with its digest."""
    return "".join(map(_text, lines)).encode("ascii")


def _text(line: dict[str, Any]) -> str:
    return json.dumps(sealed(line)) + "\n"


def read_whole_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the JSON lines of a file, and the numbers of damaged lines, counted from 1.

    A last line that a kill cut off is neither. There are none where there is no file. Lines from
    before digests were recorded have none; a file has them in each line or in no line.

    Raises:
        DamagedFileError: it is no regular file, or is larger than any run writes.
    """
    if not os.path.lexists(path):
        return [], []
    rows = read_bounded(path, max_bytes=_MAX_BYTES).split(b"\n")
    has_digests = f'"{DIGEST}"'.encode() in b"".join(rows[:-1])
    lines, damaged = [], []
    for number, row in enumerate(rows[:-1], start=1):
        line = _parse(row, has_digest=has_digests)
        if line is None:
            damaged.append(number)
        else:
            lines.append(line)
    return lines, damaged


def _parse(row: bytes, *, has_digest: bool) -> dict[str, Any] | None:
    """Return the values of a line; None if it is damaged."""
    try:
        line = json.loads(row)
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            return None
        found = line.pop(DIGEST, None)
        return line if found == (digest_of(line) if has_digest else None) else None
    except (ValueError, RecursionError):
        return None
