"""What a run keeps in sealed documents and in lines of JSON: values of a dataclass, and lines."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

from carryon.cache.errors import DamagedFileError
from carryon.cache.files.documents import read_sealed
from carryon.cache.files.full_disk import disk_full_named
from carryon.cache.files.regular import open_below, open_regular

T = TypeVar("T")


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


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line to `path`, a regular file; a kill afterwards does not lose it."""
    with disk_full_named(path):
        handle = open_below(path.parent, path.name, flags=os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(json.dumps(line) + "\n")


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
