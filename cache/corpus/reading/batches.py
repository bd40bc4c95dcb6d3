"""Rows of CSV, TSV, Parquet and Arrow files in batches of a few megabytes, for a table."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

from carryon.cache.corpus.reading.file_kinds import FileKind
from carryon.cache.corpus.reading.json_rows import MAX_RECORD_BYTES, too_long
from carryon.cache.corpus.reading.packing import open_file
from carryon.cache.errors import InputError

if TYPE_CHECKING:
    from pyarrow import RecordBatch

_BATCH_BYTES = 8 << 20
_BATCH_ROWS = 1024


def parquet_batches(path: Path) -> "Iterator[RecordBatch]":
    """Yield an empty batch, then all rows in batches of about `_BATCH_BYTES`."""
    from pyarrow import RecordBatch, parquet

    with parquet.ParquetFile(path, pre_buffer=False) as file:
        yield RecordBatch.from_pylist([], schema=file.schema_arrow)
        groups = [file.metadata.row_group(at) for at in range(file.metadata.num_row_groups)]
        row_bytes = sum(g.total_byte_size for g in groups) // max(file.metadata.num_rows, 1)
        num_rows = min(max(_BATCH_BYTES // max(row_bytes, 1), 1), _BATCH_ROWS)
        yield from file.iter_batches(batch_size=num_rows)


def arrow_batches(path: Path) -> "Iterator[RecordBatch]":
    """Yield an empty batch, then those of an Arrow file or stream."""
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(source)
            yield pyarrow.RecordBatch.from_pylist([], schema=reader.schema)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            stream = pyarrow.ipc.open_stream(source)
            yield pyarrow.RecordBatch.from_pylist([], schema=stream.schema)
            yield from stream


def csv_batches(path: Path, kind: FileKind, name: str) -> "Iterator[RecordBatch]":
    """Yield an empty batch, then all rows of a CSV or TSV file, every column text.

    The readers of pandas and Arrow guess types (007 becomes 7, NA null), and take the rest of a
    file into a cell whose quote is never closed; Python's, told to be strict, does neither.
    """
    import pyarrow

    columns: list[str] = []
    rows: list[list[str | None]] = []
    num_bytes = 0

    def batch() -> "RecordBatch":
        cells = zip(*rows, strict=True) if rows else [[] for _ in columns]
        arrays = [pyarrow.array(list(column), pyarrow.large_string()) for column in cells]
        return pyarrow.RecordBatch.from_arrays(arrays, columns)

    with open_file(path, kind.packing, name=name) as (stream, _), _any_cell_size():
        text = TextIOWrapper(stream, "utf-8-sig", newline="")
        reader = csv.reader(
            _lines(text, name), delimiter="\t" if kind.kind == "tsv" else ",", strict=True
        )
        try:
            columns = next(reader, [])
            if not columns or len(set(columns)) < len(columns):
                problem = "columns that share a name" if columns else "none"
                raise InputError(
                    f"{name}:1: expected a line with the names of columns, got {problem}"
                )
            yield batch()
            for cells in reader:
                if not cells:  # a blank line
                    continue
                if len(cells) != len(columns):
                    raise InputError(
                        f"{name}:{reader.line_num}: expected {len(columns)} cells "
                        f"({', '.join(columns)}), got {len(cells)}. Fix: quote cells that hold "
                        "the separator or a line break"
                    )
                rows.append([cell or None for cell in cells])
                num_bytes += sum(map(len, cells))
                if num_bytes > _BATCH_BYTES or len(rows) == _BATCH_ROWS:
                    yield batch()
                    rows.clear()
                    num_bytes = 0
            yield batch()
        except csv.Error as error:
            raise InputError(f"{name}:{reader.line_num}: expected CSV, got {error}") from error
        except UnicodeError as error:
            byte = error.object[error.start] if isinstance(error, UnicodeDecodeError) else 0
            raise InputError(
                f"{name}: expected UTF-8, got the byte 0x{byte:02x} after line {reader.line_num}. "
                "Fix: save it as UTF-8"
            ) from error


def _lines(text: TextIOWrapper, name: str) -> Iterator[str]:
    for number, line in enumerate(iter(partial(text.readline, MAX_RECORD_BYTES), ""), start=1):
        if len(line) == MAX_RECORD_BYTES:
            raise too_long(name, number)
        yield line


@contextmanager
def _any_cell_size() -> Iterator[None]:
    """Raise the limit on the length of a cell (131,072), which is one for the whole process."""
    before = csv.field_size_limit(MAX_RECORD_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)
