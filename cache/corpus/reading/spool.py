"""Rows in memory, written down as JSON lines so that several processes can read them."""

import datetime
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from carryon.cache.corpus.files import FileScan, scan_file
from carryon.cache.corpus.reading.split_names import log_split, usual_split
from carryon.cache.corpus.rows import Source
from carryon.cache.errors import InputError
from carryon.cache.files.atomic import PARTIAL
from carryon.cache.files.full_disk import disk_full_named


def open_rows(
    rows: Iterable[object], *, folder: Path, split: str, has_filled_nulls: bool
) -> Source:
    """Return rows in memory as a source, written to a file in `folder` that is made if missing.

    Numbers and arrays of numpy and torch become plain ones, dates texts of ISO 8601.

    Args:
        rows: dicts.
        folder: of the file, which is named by its content.
        split: that they are; empty for none.
        has_filled_nulls: whether they are of a table, which fills in nulls.

    Raises:
        InputError: a row is no dict, or holds a value that JSON cannot hold; the text names row
            and field.
        DiskFullError: no space left; nothing of the file remains.
    """
    rows = map(_without_nulls, rows) if has_filled_nulls else rows
    path, scan = _spool(rows, folder=folder, origin=f" of {split}" if split else "")
    return Source(
        name=f"rows:{split}" if split else "rows",
        kind="json lines",
        path=path,
        packing="",
        num_bytes=scan.num_bytes,
        sha256=scan.sha256,
        is_held_out=log_split("rows", split) if split else False,
        columns={},
        expected="",
        marks=scan.marks,
    )


def open_splits(splits: Mapping[object, object], *, folder: Path) -> Iterator[Source]:
    """Yield the sources of splits in memory, such as those of a DatasetDict.

    Raises:
        InputError: names that are not those of training and evaluation, or of one row.
        DiskFullError: no space left.
    """
    rows_of = {
        str(split): rows
        for split, rows in splits.items()
        if isinstance(rows, Iterable) and not isinstance(rows, str)
    }
    if not splits or len(rows_of) < len(splits) or not all(map(usual_split, rows_of)):
        first = next(iter(rows_of), "")
        one = f"one split, as data[{first!r}], or " if first else ""
        raise InputError(
            "data: expected splits whose names say train, validation or test, each with rows, got "
            f"{', '.join(map(str, splits)) or 'none'}. Fix: give {one}a list with one row"
        )
    for split, rows in rows_of.items():
        yield open_rows(rows, folder=folder, split=split, has_filled_nulls=is_data_set(rows))


def is_data_set(rows: object) -> bool:
    """Return whether rows are a `Dataset` or an `IterableDataset` of `datasets`."""
    return hasattr(rows, "features")


def _without_nulls(value: Any) -> Any:  # noqa: ANN401 -- of JSON
    """Return a row without the keys that a table fills in because another row has them."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return list(map(_without_nulls, value)) if isinstance(value, list) else value


def _spool(rows: Iterable[object], *, folder: Path, origin: str) -> tuple[Path, FileScan]:
    """Write each row as a JSON line and return the file, named by its content, and its digest."""
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
