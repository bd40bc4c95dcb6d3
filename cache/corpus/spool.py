"""Rows in memory, written down as JSON lines so that several processes can read them."""

import datetime
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from carryon.cache.corpus.files import FileScan, scan_file
from carryon.cache.errors import InputError
from carryon.cache.files import PARTIAL, disk_full_named


def spool_rows(rows: Iterable[Any], *, folder: Path, origin: str = "") -> tuple[Path, FileScan]:
    """Write each row as a JSON line and return the file, named by its content, and its digest.

    Numbers and arrays of numpy and torch become plain ones, dates texts of ISO 8601.

    Args:
        rows: dicts.
        folder: of the file; made if missing.
        origin: of rows in errors, such as " of train".

    Raises:
        InputError: a row is no dict, or holds a value that JSON cannot hold; the text names row
            and field.
        DiskFullError: no space left; nothing of the file remains.
    """
    with disk_full_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle, partial_name = tempfile.mkstemp(prefix=".rows.", suffix=PARTIAL, dir=folder)
        partial = Path(partial_name)
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                for number, row in enumerate(rows, start=1):
                    file.write(_line_of(row, where=f"row {number}{origin}"))
                file.flush()
                os.fsync(file.fileno())
            scan = scan_file(partial, has_lines=True)
            path = folder / f"rows-{scan.sha256}.jsonl"
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    return path, scan


def _line_of(row: object, *, where: str) -> str:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected a dict, got {type(row).__name__}")
    try:
        return _dump(dict(row)) + "\n"
    except (TypeError, ValueError, OverflowError, RecursionError):
        for field, value in row.items():
            try:
                _dump({field: value})
            except (TypeError, ValueError, OverflowError, RecursionError) as error:
                raise InputError(
                    f"{where}: {field}: expected values that JSON can hold, got "
                    f"{_problem(value, error)}. Fix: convert or leave out the field"
                ) from error
        raise


def _problem(value: object, error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "too deep nesting"
    if isinstance(value, float):
        return repr(value)
    return str(error).splitlines()[0]


def _dump(value: object) -> str:
    return json.dumps(value, allow_nan=False, default=_plain)


def _plain(value: object) -> object:
    """Return what JSON holds in place of `value`."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    to_list: Callable[[], object] | None = getattr(value, "tolist", None)  # of numpy and torch
    if to_list is None or isinstance(value, type):
        raise TypeError(type(value).__name__)
    return to_list()
