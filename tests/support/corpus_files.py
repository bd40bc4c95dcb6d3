"""Data files of every kind, and their rows."""

import bz2
import gzip
import json
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from carryon.cache.corpus.files import plan_shards, read_shard
from carryon.cache.corpus.rows import BadRow, Row, Source
from carryon.cache.corpus.sources import open_sources
from carryon.cache.settings import DataSettings


def open_in(folder: Path, data: Any, *column: str) -> list[Source]:  # noqa: ANN401
    """Return the sources of `data`, with their cache in `folder`."""
    return open_sources(data, DataSettings(column=list(column)), folder=folder / "cache")


def read_all(sources: Iterable[Source]) -> list[Row | BadRow]:
    """Return the rows of all shards, in order."""
    return [row for shard in plan_shards(sources) for row in read_shard(shard)]


def fields_of(folder: Path, data: Any, *column: str) -> list[dict[str, Any]]:  # noqa: ANN401
    """Return the fields of all rows of `data`; none may be bad."""
    rows = read_all(open_in(folder, data, *column))
    assert not [row for row in rows if isinstance(row, BadRow)]
    return [dict(row.fields) for row in rows if isinstance(row, Row)]


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    """Write `rows` as JSON lines, folders included, and return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write `rows` as a Parquet file, an Arrow file or, as `.stream.arrow`, an Arrow stream."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(list(rows))
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
        return path
    make = pyarrow.ipc.new_stream if ".stream" in path.name else pyarrow.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def pack(path: Path, suffix: str) -> Path:
    """Replace a file by its compressed form and return the path of that."""
    import pyarrow

    data = path.read_bytes()
    target = path.with_name(path.name + suffix)
    if suffix == ".zst":
        data = pyarrow.compress(data, codec="zstd", asbytes=True)
    else:
        data = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(data)  # type: ignore[attr-defined]
    target.write_bytes(data)
    path.unlink()
    return target
