"""Sources as shards, and shards as rows of plain fields."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from carryon.cache.corpus.reading.file_kinds import stem_of
from carryon.cache.corpus.reading.json_rows import (
    BYTE_ORDER_MARK,
    MAX_RECORD_BYTES,
    iter_values,
    parse_line,
    too_long,
)
from carryon.cache.corpus.reading.packing import open_file
from carryon.cache.corpus.reading.tables import read_rows
from carryon.cache.corpus.rows import BadRow, Row, Shard, Source
from carryon.cache.errors import InputError

SHARD_BYTES = 1 << 20
"""Least size of a shard."""
_MAX_SHARD_BYTES = 64 << 20
_SHARDS = 64
"""Of a large file: enough to keep many processes busy to the end."""
_BLOCK_BYTES = 1 << 20
_BLOCK_ROWS = 64
"""Rows of a file without marks that lie together in one of its shards."""
_MAX_PACKED_SHARDS = 8
_MAX_ARRAY_SHARDS = 4
"""Each of these reads through the whole file, so that more would cost more than they help: an
array is parsed all over, at a tenth of the time that tokenizing takes."""


@dataclass(frozen=True, slots=True)
class FileScan:
    """A file's digest and where its shards begin."""

    sha256: str
    num_bytes: int
    marks: tuple[tuple[int, int], ...]
    """As in `Source`."""


def shard_size(num_bytes: int) -> int:
    """Return the bytes of a shard of a source of this size."""
    return min(max(num_bytes // _SHARDS, SHARD_BYTES), _MAX_SHARD_BYTES)


def scan_file(path: Path, *, has_lines: bool, shard_bytes: int | None = None) -> FileScan:
    """Return digest, size and, where it `has_lines`, marks of a file, reading it once.

    Raises:
        InputError: it cannot be read.
    """
    digest, num_bytes, num_lines = hashlib.sha256(), 0, 0
    marks = [(0, 1)]
    try:
        shard_bytes = shard_bytes or shard_size(path.stat().st_size)
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                at = 0
                while has_lines:
                    at = max(at, marks[-1][0] + shard_bytes - 1 - num_bytes)
                    at = block.find(b"\n", at) + 1
                    if not at:
                        break
                    line = num_lines + block.count(b"\n", 0, at) + 1
                    marks.append((num_bytes + at, line))
                num_bytes += len(block)
                num_lines += block.count(b"\n") if has_lines else 0
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if marks[-1][0] < num_bytes:
        marks.append((num_bytes, num_lines + 1))
    return FileScan(digest.hexdigest(), num_bytes, tuple(marks) if has_lines else ())


def plan_shards(sources: Iterable[Source]) -> list[Shard]:
    """Return the shards of all sources, in order: the same for any number of processes. Pure."""
    return [shard for source in sources for shard in _shards_of(source)]


def _shards_of(source: Source) -> list[Shard]:
    if source.marks:
        # One shard goes to another process without the marks of all others.
        lean = replace(source, marks=source.marks[-1:])
        return [
            Shard(source=lean, start=start, stop=stop, first_number=number)
            for (start, number), (stop, _) in pairwise(source.marks)
        ]
    of = -(-source.num_bytes // SHARD_BYTES) or 1
    if source.kind == "text":
        of = 1
    else:
        of = min(of, _MAX_PACKED_SHARDS if source.kind == "json lines" else _MAX_ARRAY_SHARDS)
    return [Shard(source=source, start=at, stop=at + 1, first_number=1, of=of) for at in range(of)]


def read_shard(shard: Shard) -> Iterator[Row | BadRow]:
    """Yield the rows of a shard in order; one line, element or batch is in memory at a time.

    Raises:
        InputError: the file cannot be read on from some place, which the text names: it is cut
            off or damaged, or an array holds malformed JSON.
    """
    source = shard.source
    if source.kind == "table":
        return _read_table(shard)
    if source.kind == "text":
        return _read_text(source)
    return _read_array(shard) if source.kind == "json array" else _read_lines(shard)


def rename_fields(fields: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """Return `fields` with each of `columns` (field -> column) under the field's name."""
    if not columns:
        return fields
    taken = set(columns.values()) | set(columns)
    kept = {name: value for name, value in fields.items() if name not in taken}
    return kept | {field: fields[name] for field, name in columns.items() if name in fields}


def _read_lines(shard: Shard) -> Iterator[Row | BadRow]:
    source, is_packed = shard.source, bool(shard.source.packing)
    prefix = _id_prefix(source)
    with open_file(source.path, source.packing, name=source.name) as (stream, position):
        if not is_packed:
            stream.seek(shard.start)
        at, number, before = shard.start, shard.first_number, 0
        # Bytes: only \n ends a line, and a bad byte has a line number.
        for line in iter(partial(stream.readline, MAX_RECORD_BYTES), b""):
            if len(line) == MAX_RECORD_BYTES:
                raise too_long(source.name, number)
            if not is_packed and at >= shard.stop:
                break
            at += len(line)
            num_bytes = len(line)
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if is_packed:
                num_bytes, before = position() - before, position()
            if line.strip() and _is_mine(number, shard):
                where = _where(source, number)
                try:
                    fields = parse_line(line)
                except ValueError as error:
                    yield BadRow(where=where, problem=str(error), num_bytes=num_bytes)
                else:
                    yield _row(source, fields, f"{prefix}-{number}", where, num_bytes)
            number += 1


def _read_array(shard: Shard) -> Iterator[Row | BadRow]:
    source, prefix, before = shard.source, _id_prefix(shard.source), 0
    with open_file(source.path, source.packing, name=source.name) as (stream, position):
        for number, (value, line) in enumerate(iter_values(stream, source.name), start=1):
            num_bytes, before = position() - before, position()
            if not _is_mine(number, shard):
                continue
            where = f"{source.name} row {number} (line {line})"
            if isinstance(value, str):
                yield BadRow(where=where, problem=value, num_bytes=num_bytes)
            else:
                yield _row(source, value, f"{prefix}-{number}", where, num_bytes)


def _read_table(shard: Shard) -> Iterator[Row | BadRow]:
    source, prefix = shard.source, _id_prefix(shard.source)
    num_bytes = source.num_bytes // source.marks[-1][0]
    rows = read_rows(source.path, shard.start, shard.stop, name=source.name)
    for number, fields in enumerate(rows, start=shard.first_number):
        where = f"{source.name} row {number}"
        if isinstance(fields, str):
            yield BadRow(where=where, problem=fields, num_bytes=num_bytes)
        else:
            yield _row(source, fields, f"{prefix}-{number}", where, num_bytes)


def _read_text(source: Source) -> Iterator[Row | BadRow]:
    with open_file(source.path, source.packing, name=source.name) as (stream, _):
        data = stream.read()
    try:
        text = str(memoryview(data)[3 * data.startswith(BYTE_ORDER_MARK) :], "utf-8")
    except UnicodeDecodeError as error:
        problem = (
            f"expected UTF-8 text, got the byte 0x{error.object[error.start]:02x} at "
            f"{error.start}. Fix: convert or unpack it first"
        )
        yield BadRow(where=source.name, problem=problem, num_bytes=source.num_bytes)
        return
    del data  # a long text is in memory once while its row is at work
    if text:
        yield _row(source, {"text": text}, _id_prefix(source), source.name, source.num_bytes)


def _is_mine(number: int, shard: Shard) -> bool:
    return shard.of == 1 or (number - 1) // _BLOCK_ROWS % shard.of == shard.start


def _where(source: Source, number: int) -> str:
    if source.name == str(source.path):
        return f"{source.name}:{number}"
    _, _, split = source.name.partition(":")  # rows in memory
    return f"row {number} of {split}" if split else f"row {number}"


def _id_prefix(source: Source) -> str:
    """Return how made ids of a source begin; worked out once, as it costs more than a row."""
    stem = stem_of(source.name).encode("utf-8", "replace").decode()
    return f"{stem}-{source.sha256[:8]}"


def _row(
    source: Source, fields: Mapping[str, Any], made_id: str, where: str, num_bytes: int
) -> Row:
    return Row(
        fields=rename_fields(fields, source.columns),
        where=where,
        made_id=made_id,
        num_bytes=num_bytes,
        is_held_out=source.is_held_out,
        expected=source.expected,
        has_filled_nulls=source.kind == "table",
    )
