"""Read data as rows of plain fields: files, told apart by suffix, or rows in memory.

    .jsonl .json .ndjson   one JSON object a line; blank lines are skipped
    .parquet               one record a row (the extra `parquet`)
    anything else          UTF-8 text, the whole file one document; an empty file holds none

Files are streamed: one line, or 1,024 rows of a Parquet file, are in memory at a time.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError, MissingError
from carryon.cache.optional import require

Data = str | Path | Iterable[str | Path] | Iterable[Mapping[str, Any]]
"""A file or folder, several of them, or rows: dicts with the fields of a JSON line."""
FIELDS = ("messages", "prompt", "completion", "text", "id", "split")
"""The fields of a row that are read; a row may have more."""
_JSON_SUFFIXES = frozenset({".jsonl", ".json", ".ndjson"})


@dataclass(frozen=True, slots=True)
class Row:
    """Plain fields and their origin."""

    fields: Mapping[str, Any]
    where: str
    """File and line or row, for error texts."""
    stem: str
    """Name of the file without its suffix; `row` in memory."""
    number: int | None
    """Line or row, counted from 1; None for a whole file."""
    num_bytes: int
    """Size in the file; of a Parquet row the average."""


def open_data(data: Data) -> tuple[list[dict[str, Any]], Iterator[Row]]:
    """Return the description of each file in `data`, and all rows, read on demand.

    Raises:
        MissingError: a path does not exist.
        InputError: a folder without files, a file given twice, or a mapping instead of rows.
    """
    if isinstance(data, Mapping):
        raise InputError(
            "data: expected paths or an iterable of rows, got one mapping. Fix: give one of its "
            f"splits ({', '.join(map(str, data))}), or a list with one row"
        )
    items: Iterator[Any] = iter([data] if isinstance(data, str | Path) else data)
    first = next(items, None)
    if isinstance(first, Mapping):
        return [], _read_memory(chain([first], items))
    files = list_files([] if first is None else [first, *items])
    return [describe_file(path) for path in files], read_files(files)


def list_files(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files in `paths`, in order; of a folder all files in it, at any depth.

    Files of a folder are sorted by path; hidden ones (a name in the path begins with a dot) are
    left out.

    Raises:
        MissingError: a path does not exist.
        InputError: a folder without files, or a file given twice.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise MissingError(f"{path}: no such file or folder")
        inside = _files_below(path) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path}: expected a folder with files in it, found none")
        files.extend(inside)
    for path, count in Counter(file.resolve() for file in files).items():
        if count > 1:
            raise InputError(f"{path}: given more than once, expected each file once")
    return files


def describe_file(path: Path) -> dict[str, Any]:
    """Return `name` (without its folder), `bytes` and `sha256` of a file, reading it once."""
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return {"name": path.name, "bytes": stream.tell(), "sha256": digest}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def read_files(files: Iterable[Path]) -> Iterator[Row]:
    """Yield the rows of all files, read on demand.

    Raises:
        InputError: a line is not a JSON object, or the file is not what its suffix says; the text
            names the file and the line.
        MissingExtraError: a Parquet file, and pyarrow is not installed.
    """
    for path in files:
        suffix = path.suffix.lower()
        if suffix in _JSON_SUFFIXES:
            yield from _read_json_lines(path)
        else:
            yield from _read_parquet(path) if suffix == ".parquet" else _read_text(path)


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _read_memory(rows: Iterable[Any]) -> Iterator[Row]:
    for number, fields in enumerate(rows, start=1):
        where = f"row {number}"
        if not isinstance(fields, Mapping):
            raise InputError(f"{where}: expected a dict, got {type(fields).__name__}")
        yield Row(fields, where, "row", number, len(repr(fields)))


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:  # bytes: only \n ends a line, and a bad byte has a line number
        for number, line in enumerate(stream, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line.rstrip().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                reason = str(error)
                if isinstance(error, json.JSONDecodeError):  # its "line 1" is not the file's
                    reason = f"{error.msg} at column {error.colno}"
                raise InputError(
                    f"{where}: expected one JSON object a line, got malformed JSON: {reason}"
                ) from error
            if not isinstance(fields, dict):
                raise InputError(
                    f"{where}: expected one JSON object a line, got {type(fields).__name__}"
                )
            yield Row(fields, where, path.stem, number, len(line))


def _read_parquet(path: Path) -> Iterator[Row]:
    pyarrow = require("pyarrow", extra="parquet", purpose=f"reading {path.name}")
    parquet = require("pyarrow.parquet", extra="parquet", purpose=f"reading {path.name}")
    try:
        with parquet.ParquetFile(path) as file:
            num_bytes = path.stat().st_size // max(file.metadata.num_rows, 1)
            known = [name for name in file.schema_arrow.names if name in FIELDS]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=known or None):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, f"{path} row {number}", path.stem, number, num_bytes)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: expected a Parquet file: {error}") from error


def _read_text(path: Path) -> Iterator[Row]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected .jsonl, .parquet or UTF-8 text, got bytes that are not text "
            f"at {error.start}: convert or unpack it first"
        ) from error
    if text:
        yield Row({"text": text}, str(path), path.stem, None, len(data))
