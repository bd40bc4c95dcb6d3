"""Rows: what a source yields before anybody knows which kind of record it is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Data = str | Path | Iterable[str | Path] | Iterable[Mapping[str, Any]] | Mapping[str, Any]
"""Files, folders, hub ids; or rows: dicts with the fields of a JSON line, such as a
`datasets.Dataset`; or a mapping of split names to rows, such as a `datasets.DatasetDict`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file or table of the corpus, described before its rows are read."""

    name: str
    """As errors and tables name it: path as given, or `hub-id:split`; `rows` in memory."""
    kind: Literal["json lines", "json array", "text", "table"]
    """`table`: a memory-mapped Arrow table, made by `datasets`."""
    path: Path
    """The file itself; of a table, the folder of its Arrow files in the cache."""
    packing: str
    """Suffix of its compression, such as `.gz`; empty for none."""
    num_bytes: int
    sha256: str
    """Of the file's bytes; of a table, of what made it. Equal digests are equal rows."""
    is_held_out: bool
    """Whether its split or its name keeps all of it from training."""
    columns: Mapping[str, str]
    """Field of the record -> column that it is read from (`--column text=body`)."""
    expected: str
    """Kind of record of its first good row, which all others must have; empty until known."""
    marks: tuple[tuple[int, int], ...] = ()
    """Where shards begin, about every 4 MB, and the end: (byte, number of the line that begins
    there) in JSON lines, (row before, row number) in a table. None where no shard can begin."""

    @property
    def facts(self) -> dict[str, Any]:
        """Return what the manifest records: `name` (without folder), `bytes` and `sha256`."""
        return {"name": Path(self.name).name, "bytes": self.num_bytes, "sha256": self.sha256}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Rows of one source that one process reads: pure data, the same for any number of them."""

    source: Source
    start: int
    """First byte of a line, first row of a table, or number of the stride (see `of`)."""
    stop: int
    """Byte after the last one, or row after the last one."""
    first_number: int
    """Line or row number, counted from 1, of the first row."""
    of: int = 1
    """A compressed file or JSON array cannot be entered in the middle: each of `of` shards reads
    through all of it and keeps every `of`-th block of rows, beginning with block `start`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Plain fields and their origin."""

    fields: Mapping[str, Any]
    where: str
    """File and line or row, for error texts."""
    made_id: str
    """Id of a record that has none: file stem, eight hex digits of the source's digest and the
    number, so unique among all sources that differ in content."""
    num_bytes: int
    """Size in the file, for progress; of a table's row the average."""
    is_held_out: bool
    """Whether its source is."""
    expected: str
    """As in `Source`."""
    has_filled_nulls: bool = False
    """Whether nulls say nothing: a table fills in every key that any of its rows has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that is no record, such as malformed JSON."""

    where: str
    problem: str
    """One line, without `where`."""
    num_bytes: int
