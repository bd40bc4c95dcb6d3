"""Tables: CSV, Parquet and Arrow files as memory-mapped Arrow in a cache folder.

A table is a folder with `table.json`, which lists Arrow files (streams) and their rows: files
beside it, made from one that was given, or files elsewhere that Arrow can map as they are. It is
named by the digest of what it was made from, and whole or not there.
"""

import csv
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carryon.cache.corpus.file_kinds import FileKind
from carryon.cache.corpus.packing import open_file
from carryon.cache.errors import InputError
from carryon.cache.files import PARTIAL, disk_full_named, sync_below

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import Field, RecordBatch

_VERSION = 1
"""Of the way in which files become tables: part of a table's name."""
_BATCH_BYTES = 8 << 20
_BATCH_ROWS = 1024
_READ_ROWS = 64


@dataclass(frozen=True, slots=True)
class Table:
    """Arrow files in the order of their rows."""

    path: Path
    """Folder with table.json."""
    num_rows: int
    num_bytes: int
    """Of the Arrow files."""


def convert_file(path: Path, kind: FileKind, *, name: str, digest: str, folder: Path) -> Table:
    """Return the table of a CSV, TSV, Parquet or Arrow file; it is made once.

    Every cell of CSV and TSV is text, an empty one null: nothing is guessed.

    Raises:
        InputError: the file is not what its suffix says; of CSV the text names the line.
        DiskFullError: no space left; nothing of the table remains.
    """
    target = folder / f"{kind.kind}-{_VERSION}-{digest}"
    if table := _find_table(target):
        return table
    with _whole_table(target) as partial:
        source = path
        if kind.packing and kind.kind in ("parquet", "arrow"):  # these are entered in the middle
            source = partial / "unpacked"
            with open_file(path, kind.packing, name=name) as (stream, _), source.open("wb") as out:
                shutil.copyfileobj(stream, out, _BATCH_BYTES)
        if kind.kind == "parquet":
            batches = _parquet_batches(source)
        elif kind.kind == "arrow":
            batches = _arrow_batches(source)
        else:
            batches = _csv_batches(path, kind, name)
        with _named_errors(name, kind.kind):
            _write_batches(batches, partial / "rows.arrow")
        if source != path:
            source.unlink()
        table = _write_list(partial, [Path("rows.arrow")])
    return replace(table, path=target)


def list_arrow(files: Sequence[Path], *, name: str, digest: str, folder: Path) -> Table:
    """Return a table of Arrow streams that stay where they are.

    Raises:
        InputError: a file is missing or no Arrow stream.
    """
    target = folder / f"listed-{_VERSION}-{digest}"
    if table := _find_table(target):
        return table
    with _whole_table(target) as partial, _named_errors(name, "arrow"):
        table = _write_list(partial, [file.resolve() for file in files])
    return replace(table, path=target)


def saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a data set that `Dataset.save_to_disk` wrote to `folder`.

    Raises:
        InputError: its state.json does not list them.
    """
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        names = [item["filename"] for item in state["_data_files"]]
        files = [folder / name for name in names]
        if any(Path(name).name != name for name in names) or not files:
            raise ValueError("it names no files in this folder")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder}: expected a saved data set, got a damaged state.json ({error}). "
            "Fix: save it again with save_to_disk"
        ) from error
    for file in files:
        if not file.is_file():
            raise InputError(
                f"{folder}: expected the file {file.name} of a saved data set, got none"
            )
    return files


def saved_splits(folder: Path) -> list[str]:
    """Return the splits of a data set that `DatasetDict.save_to_disk` wrote to `folder`.

    Raises:
        InputError: its dataset_dict.json does not list them.
    """
    try:
        splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
        if not isinstance(splits, list) or any(Path(name).name != name for name in splits):
            raise ValueError("it names no splits")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{folder}: expected a saved data set, got a damaged dataset_dict.json ({error}). "
            "Fix: save it again with save_to_disk"
        ) from error
    return splits


def read_rows(path: Path, start: int, stop: int, *, name: str) -> Iterator[dict[str, Any] | str]:
    """Yield rows `start` to `stop` (exclusive) of a table as plain values; of a bad row a problem.

    Raises:
        InputError: an Arrow file was removed or damaged since the table was opened.
    """
    with _named_errors(name, "arrow"):
        listed = json.loads((path / "table.json").read_text("ascii"))
        first = 0
        for file, num_rows in zip(listed["files"], listed["rows"], strict=True):
            begin, end = max(start - first, 0), min(stop - first, num_rows)
            if begin < end:
                yield from _read_arrow(path / file, begin, end)
            first += num_rows


def _read_arrow(file: Path, start: int, stop: int) -> Iterator[dict[str, Any] | str]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
        if b"huggingface" in (table.schema.metadata or {}):  # may hold types that are decoded
            from datasets import Dataset

            dataset = Dataset.from_file(str(file))
            media = [n for n, kind in dataset.features.items() if getattr(kind, "decode", False)]
            yield from dataset.remove_columns(media).select(range(start, stop))
            return
        for begin in range(start, stop, _READ_ROWS):
            yield from _plain_rows(table.slice(begin, min(_READ_ROWS, stop - begin)))


def _plain_rows(table: "pyarrow.Table") -> Iterator[dict[str, Any] | str]:
    """Yield rows as plain values; in place of one with a text that is not UTF-8 its problem."""
    try:
        yield from table.to_pylist()
    except UnicodeDecodeError as error:
        if len(table) == 1:
            yield f"expected UTF-8, got the byte 0x{error.object[error.start]:02x}"
            return
        for row in range(len(table)):
            yield from _plain_rows(table.slice(row, 1))


def _find_table(folder: Path) -> Table | None:
    """Return a table that is there; None if it, or one of its files, was removed or changed."""
    try:
        listed = json.loads((folder / "table.json").read_text("ascii"))
        sizes = [(folder / file).stat().st_size for file in listed["files"]]
    except (OSError, ValueError, KeyError):
        return None
    return Table(folder, sum(listed["rows"]), sum(sizes)) if sizes == listed["bytes"] else None


def _write_list(folder: Path, files: Sequence[Path]) -> Table:
    import pyarrow

    rows = []
    for file in files:
        with pyarrow.memory_map(str(folder / file)) as source:
            rows.append(pyarrow.ipc.open_stream(source).read_all().num_rows)
    sizes = [(folder / file).stat().st_size for file in files]
    listed = {
        "files": [os.fspath(file) for file in files],
        "rows": rows,
        "bytes": sizes,
    }
    (folder / "table.json").write_text(json.dumps(listed, indent=1) + "\n", "ascii")
    return Table(folder, sum(rows), sum(sizes))


def _write_batches(batches: "Iterator[RecordBatch]", path: Path) -> None:
    import pyarrow

    first = next(batches)  # an empty one, with the schema
    plain = pyarrow.schema([_plain_field(field) for field in first.schema], first.schema.metadata)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, plain) as writer:
        for batch in batches:
            writer.write_batch(batch if batch.schema.equals(plain) else batch.cast(plain))


def _plain_field(field: "Field") -> "Field":
    """Return a field of categories (pandas writes them) as one of their values."""
    import pyarrow

    is_coded = pyarrow.types.is_dictionary(field.type)
    return field.with_type(field.type.value_type) if is_coded else field


def _parquet_batches(path: Path) -> "Iterator[RecordBatch]":
    """Yield an empty batch, then all rows in batches of about `_BATCH_BYTES`."""
    from pyarrow import RecordBatch, parquet

    with parquet.ParquetFile(path, pre_buffer=False) as file:
        yield RecordBatch.from_pylist([], schema=file.schema_arrow)
        groups = [file.metadata.row_group(at) for at in range(file.metadata.num_row_groups)]
        row_bytes = sum(g.total_byte_size for g in groups) // max(file.metadata.num_rows, 1)
        num_rows = min(max(_BATCH_BYTES // max(row_bytes, 1), 1), _BATCH_ROWS)
        yield from file.iter_batches(batch_size=num_rows)


def _arrow_batches(path: Path) -> "Iterator[RecordBatch]":
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


def _csv_batches(path: Path, kind: FileKind, name: str) -> "Iterator[RecordBatch]":
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
        reader = csv.reader(text, delimiter="\t" if kind.kind == "tsv" else ",", strict=True)
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


@contextmanager
def _any_cell_size() -> Iterator[None]:
    """Lift the limit on the length of a cell (131,072), which is one for the whole process."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


@contextmanager
def _whole_table(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end of the block it becomes `target`.

    Where another process was faster, its table stays: both hold the same. One that was damaged
    since it was made is replaced.
    """
    with disk_full_named(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(
            tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PARTIAL, dir=target.parent)
        )
        try:
            yield partial
            sync_below(partial, partial.iterdir())
            try:
                partial.rename(target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if _find_table(target) is None:
                    shutil.rmtree(target)
                    partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _named_errors(name: str, kind: str) -> Iterator[None]:
    import pyarrow

    kinds: Iterable[type[Exception]] = (pyarrow.ArrowException, OSError, ValueError, KeyError)
    try:
        yield
    except InputError:
        raise
    except tuple(kinds) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        title = {"parquet": "a Parquet file", "arrow": "an Arrow file"}.get(kind, kind.upper())
        raise InputError(f"{name}: expected {title}, got: {reason}") from error
