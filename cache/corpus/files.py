"""Files of the user as rows of plain fields.

Three kinds of file, told apart by suffix:

    .jsonl .json .ndjson   one JSON object a line; blank lines are passed over
    .parquet               one record a row (the extra `parquet`)
    anything else          UTF-8 text, the whole file one document; an empty file holds none

Files are streamed: one line, or 1,024 rows of a Parquet file, are held at a time.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError, MissingError
from carryon.cache.optional import require

FIELDS = ("messages", "prompt", "completion", "text", "id", "split")
"""The fields of a row that mean something; a row may have more."""

_JSON_SUFFIXES = frozenset({".jsonl", ".json", ".ndjson"})


@dataclass(frozen=True, slots=True)
class Row:
    """Plain fields, and where they stood."""

    fields: Mapping[str, Any]
    where: str
    """File and line or row, for error texts."""
    number: int | None
    """Line or row, counted from 1; None for a whole file."""
    num_bytes: int
    """Size in the file; of a Parquet row the average."""


def list_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files that `paths` mean: a folder means all files in it, at any depth.

    Files of a folder come in the order of their paths; hidden ones (a name in the path begins
    with a dot) are left out. The order of `paths` is kept.

    Raises:
        MissingError: a path does not exist.
        InputError: a folder without files, or a file that is meant twice.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise MissingError(f"{path}: no such file or folder")
        found = _files_below(path) if path.is_dir() else [path]
        if not found:
            raise InputError(f"{path}: expected a folder with files in it, found none")
        files.extend(found)
    twice = [path for path, count in Counter(file.resolve() for file in files).items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]}: given more than once, expected each file once")
    return files


def describe_file(path: Path) -> dict[str, Any]:
    """Return `name` (without its folder), `bytes` and `sha256` of a file, reading it once."""
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return {"name": path.name, "bytes": stream.tell(), "sha256": digest}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def read_rows(path: Path) -> Iterator[Row]:
    """Return the rows of one file, read as they are asked for.

    Raises:
        InputError: a line is not a JSON object, or the file is not what its suffix says; the text
            names the file and the line.
        MissingExtraError: a Parquet file, and pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    if suffix in _JSON_SUFFIXES:
        return _read_json_lines(path)
    return _read_parquet(path) if suffix == ".parquet" else _read_text(path)


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def _read_json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as stream:  # bytes: only \n ends a line, and a bad byte has a line number
        for number, line in enumerate(stream, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line.rstrip().decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{where}: expected one JSON object a line, got malformed JSON: "
                    f"{_describe(error)}"
                ) from error
            if not isinstance(fields, dict):
                raise InputError(
                    f"{where}: expected one JSON object a line, got {type(fields).__name__}"
                )
            yield Row(fields, where, number, len(line))


def _describe(error: Exception) -> str:
    # without json's own "line 1", which is not the line in the file
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


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
                    yield Row(fields, f"{path} row {number}", number, num_bytes)
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
        yield Row({"text": text}, str(path), None, len(data))
