"""Tables: CSV, Parquet and Arrow files as memory-mapped Arrow in a cache folder.

A table is a folder with `table.json`, which lists Arrow files (streams) and their rows: files
beside it, made from one that was given, or files elsewhere that Arrow can map as they are. It is
named by the digest of what it was made from, and whole or not there.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carryon.cache.corpus.reading.batches import arrow_batches, csv_batches, parquet_batches
from carryon.cache.corpus.reading.file_kinds import FileKind
from carryon.cache.corpus.reading.packing import open_file
from carryon.cache.errors import InputError
from carryon.cache.files.atomic import PARTIAL, sync_below
from carryon.cache.files.documents import read_object
from carryon.cache.files.full_disk import disk_full_named

if TYPE_CHECKING:
    import pyarrow
    from pyarrow import Field, RecordBatch

_VERSION = 1
"""Of the way in which files become tables: part of a table's name."""
_COPY_BYTES = 8 << 20
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
                shutil.copyfileobj(stream, out, _COPY_BYTES)
        if kind.kind == "parquet":
            batches = parquet_batches(source)
        elif kind.kind == "arrow":
            batches = arrow_batches(source)
        else:
            batches = csv_batches(path, kind, name)
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


def read_rows(path: Path, start: int, stop: int, *, name: str) -> Iterator[dict[str, Any] | str]:
    """Yield rows `start` to `stop` (exclusive) of a table as plain values; of a bad row a problem.

    Raises:
        InputError: an Arrow file was removed or damaged since the table was opened.
    """
    with _named_errors(name, "arrow"):
        listed = read_object(path / "table.json")
        first = 0
        for file, num_rows in zip(listed["files"], listed["rows"], strict=True):
            begin, end = max(start - first, 0), min(stop - first, num_rows)
            if begin < end:
                yield from _read_arrow(path / file, begin, end)
            first += num_rows


def _read_arrow(file: Path, start: int, stop: int) -> Iterator[dict[str, Any] | str]:
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        options = pyarrow.ipc.IpcReadOptions(use_threads=False)  # this may be a forked process
        table = pyarrow.ipc.open_stream(source, options=options).read_all()
        if b"huggingface" in (table.schema.metadata or {}):  # may hold types that are decoded
            from datasets import Dataset

            dataset = Dataset.from_file(str(file))
            media = [name for name, kind in dataset.features.items() if _is_media(kind)]
            yield from dataset.remove_columns(media).select(range(start, stop))
            return
        for begin in range(start, stop, _READ_ROWS):
            yield from _plain_rows(table.slice(begin, min(_READ_ROWS, stop - begin)))


def _is_media(kind: object) -> bool:
    """Return whether a column holds images or the like: no text, and costly to decode."""
    return getattr(kind, "decode", False) and type(kind).__name__ != "Json"


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
        listed = read_object(folder / "table.json")
        sizes = [(folder / file).stat().st_size for file in listed["files"]]
    except (OSError, ValueError, KeyError, TypeError):
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

    kinds: Iterable[type[Exception]] = (
        pyarrow.ArrowException,
        OSError,
        ValueError,
        KeyError,
        ImportError,  # of what an image inside a message needs
    )
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
