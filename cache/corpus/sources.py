"""Data as sources: files, folders, data sets on the hub or rows in memory, each looked at once."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from carryon.cache.corpus.files import (
    plan_shards,
    read_shard,
    rename_fields,
    scan_file,
    shard_size,
)
from carryon.cache.corpus.reading import folders
from carryon.cache.corpus.reading.cache_folder import writing_cache
from carryon.cache.corpus.reading.file_kinds import (
    kind_by_content,
    kind_by_name,
    refuse_unknown,
    stem_of,
)
from carryon.cache.corpus.reading.folders import Part, list_parts, name_some
from carryon.cache.corpus.reading.hub import HubName, load_splits, parse_hub_name
from carryon.cache.corpus.reading.saved_sets import saved_files
from carryon.cache.corpus.reading.split_names import (
    choose_splits,
    is_evaluation,
    keyword_in,
    log_split,
)
from carryon.cache.corpus.reading.spool import is_data_set, open_rows, open_splits
from carryon.cache.corpus.reading.tables import Table, convert_file, list_arrow
from carryon.cache.corpus.records import kind_of
from carryon.cache.corpus.rows import Data, Row, Source
from carryon.cache.errors import InputError, MissingError
from carryon.cache.settings import DataSettings

logger = logging.getLogger(__name__)

_FIRST_ROWS = 1024
"""Rows of a source among which the first of a known kind is looked for."""


def open_sources(data: Data, settings: DataSettings, *, folder: Path) -> list[Source]:
    """Return the sources of `data` in order, each file read once for its digest.

    A path that exists is taken for a file or folder, another one of the form `name/repo` for a data
    set on the hub; `@revision` and `:split` may follow. Splits, and files of a folder, whose names
    say test or validation are held out. A source whose content is that of an earlier one is left
    out, with a warning.

    Args:
        data: see `Data`.
        settings: columns to rename, and the hub's configuration.
        folder: cache of tables and of rows in memory, made if missing. Two processes may share it.

    Raises:
        MissingError: no such file, folder or data set.
        InputError: data of no known kind, without a split that is for training or evaluation,
            given twice, or without a column of `settings.column`.
        DiskFullError: `folder` cannot be written.
    """
    columns = _parse_columns(settings.column)
    with writing_cache(folder):
        sources = list(_drop_equal(_open_data(data, settings, folder)))
    return [_expect_kind(source, columns) for source in sources]


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
            raise MissingError(f"{path}: no such file or folder. Fix: check the path")
        files += folders.list_files(path) if path.is_dir() else [path]
    _refuse_twice(files)
    return files


def describe_file(path: Path) -> dict[str, Any]:
    """Return `name` (without its folder), `bytes` and `sha256` of a file, reading it once.

    Raises:
        InputError: it cannot be read.
    """
    scan = scan_file(path, has_lines=False)
    return {"name": path.name, "bytes": scan.num_bytes, "sha256": scan.sha256}


def _open_data(data: object, settings: DataSettings, folder: Path) -> Iterator[Source]:
    if isinstance(data, Mapping):
        yield from open_splits(data, folder=folder)
        return
    if not isinstance(data, str | Path | Iterable):
        raise InputError(f"data: expected paths or rows, got {type(data).__name__}")
    items = iter([data] if isinstance(data, str | Path) else data)
    first = next(items, None)
    if first is not None and not isinstance(first, str | Path):
        rows = chain([first], items)
        yield open_rows(rows, folder=folder, split="", has_filled_nulls=is_data_set(data))
        return
    places: list[Part | HubName] = []
    for item in [] if first is None else [first, *items]:
        if not isinstance(item, str | Path):
            raise InputError(f"data: expected paths only, got {type(item).__name__} among them")
        places += _locate(str(item))
    _refuse_twice(place.path for place in places if isinstance(place, Part))
    if settings.data_config and not any(isinstance(place, HubName) for place in places):
        raise InputError(
            f"data_config: expected data on the hub, got files for {settings.data_config}. "
            "Fix: leave out --data-config"
        )
    for place in places:
        if isinstance(place, HubName):
            yield from _open_hub(place, settings.data_config, folder)
        else:
            yield _open_part(place, folder)


def _locate(text: str) -> list[Part | HubName]:
    """Return what a path or name stands for, before any of it is read but a file's first bytes."""
    path, split = Path(text), ""
    if not path.exists():
        before, _, after = text.rpartition(":")
        if before and Path(before).exists():
            path, split = Path(before), after
        elif hub := parse_hub_name(text):
            return [hub]
        else:
            raise MissingError(
                f"{text}: no such file or folder. Fix: check the path; a data set of the hub is "
                "OWNER/NAME"
            )
    if path.is_dir():
        if not split and is_evaluation(path.name):
            _log_trained(path)
        return list(list_parts(path, split))
    if split:
        raise InputError(f"{text}: expected a folder with splits, got a file. Fix: give {path}")
    if not path.is_file():
        raise InputError(f"{path}: expected a file that can be read twice, got a pipe or device")
    kind = kind_by_name(path)
    if kind is None:
        kind = kind_by_content(path)
        if kind is None:
            raise refuse_unknown(path)
        logger.info("%s: read as %s, which its first bytes are", path, kind.kind)
    if is_evaluation(stem_of(path.name)):
        _log_trained(path)
    return [Part(path, kind, False)]


def _log_trained(path: Path) -> None:
    logger.info(
        "%s: read for training, since it was given by itself, although its name says %s",
        path,
        keyword_in(stem_of(path.name)),
    )


def _open_part(part: Part, folder: Path) -> Source:
    """Return the source of a file or a saved data set, reading it once."""
    name, kind = str(part.path), part.kind
    if kind is None:
        files = saved_files(part.path)
        scans = [scan_file(file, has_lines=False) for file in files]
        digest = hashlib.sha256(" ".join(scan.sha256 for scan in scans).encode()).hexdigest()
        table = list_arrow(files, name=name, digest=digest, folder=folder)
        return _table_source(name, table, digest, is_held_out=part.is_held_out)
    has_marks = kind.kind == "json lines" and not kind.packing
    scan = scan_file(part.path, has_lines=has_marks)
    if kind.kind in ("json lines", "json array", "text"):
        return Source(
            name=name,
            kind=kind.kind,
            path=part.path,
            packing=kind.packing,
            num_bytes=scan.num_bytes,
            sha256=scan.sha256,
            is_held_out=part.is_held_out,
            columns={},
            expected="",
            marks=scan.marks,
        )
    table = convert_file(part.path, kind, name=name, digest=scan.sha256, folder=folder)
    source = _table_source(name, table, scan.sha256, is_held_out=part.is_held_out)
    return replace(source, num_bytes=scan.num_bytes)


def _table_source(name: str, table: Table, digest: str, *, is_held_out: bool) -> Source:
    step = max(table.num_rows * shard_size(table.num_bytes) // max(table.num_bytes, 1), 1)
    return Source(
        name=name,
        kind="table",
        path=table.path,
        packing="",
        num_bytes=table.num_bytes,
        sha256=digest,
        is_held_out=is_held_out,
        columns={},
        expected="",
        marks=tuple((row, row + 1) for row in [*range(0, table.num_rows, step), table.num_rows]),
    )


def _open_hub(name: HubName, config: str, folder: Path) -> Iterator[Source]:
    loaded = load_splits(
        name,
        config=config,
        choose=lambda splits: choose_splits(name.name, name.split, splits),
        folder=folder,
    )
    for item in loaded:
        is_held_out = log_split(name.name, item.split)
        title = f"{name.name}:{item.split}"
        yield _table_source(title, item.table, item.digest, is_held_out=is_held_out)


def _drop_equal(sources: Iterable[Source]) -> list[Source]:
    """Return sources of different content; empty ones are no repetition of each other."""
    kept: dict[tuple[str, str], Source] = {}
    for source in sources:
        key = (source.sha256, source.kind if source.num_bytes else source.name)
        if key in kept:
            logger.warning("%s: left out: its content is that of %s", source.name, kept[key].name)
        kept.setdefault(key, source)
    return list(kept.values())


def _refuse_twice(paths: Iterable[Path]) -> None:
    # Of a link to a file its own place counts: in the hub's cache equal files are links to one.
    places = Counter(path.parent.resolve() / path.name for path in paths)
    for place, count in places.items():
        if count > 1:
            raise InputError(f"{place}: given more than once, expected each file once")


def _parse_columns(items: Iterable[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for item in items:
        field, _, column = item.partition("=")
        if not field or not column or field in columns:
            got = f"a second column for {field}" if field in columns else repr(item)
            raise InputError(f"column: expected FIELD=COLUMN, got {got}. Fix: --column text=NAME")
        columns[field] = column
    return columns


def _expect_kind(source: Source, columns: Mapping[str, str]) -> Source:
    """Return `source` with its columns, once they are found there, and the kind of its records."""
    if source.kind == "text":
        _refuse_missing(source.name, columns, set(columns.values()) - {"text"}, ["text"])
        return replace(source, expected="text")
    rows = (row for shard in plan_shards([source]) for row in read_shard(shard))
    expected, given, missing = "", list[str](), set(columns.values())
    for row in islice(rows, _FIRST_ROWS):
        if not isinstance(row, Row):
            continue
        given = given or list(row.fields)
        missing -= row.fields.keys()
        expected = expected or kind_of(rename_fields(row.fields, columns))
        if expected and not missing:
            break
    if given:
        _refuse_missing(source.name, columns, missing, given)
    return replace(source, columns=dict(columns), expected=expected)


def _refuse_missing(
    name: str, columns: Mapping[str, str], missing: Iterable[str], given: list[str]
) -> None:
    """Refuse the first of `columns` that is missing; `given` are those of the first row."""
    missing = set(missing)
    for field, column in columns.items():
        if column in missing:
            raise InputError(
                f"{name}: column {column}: expected one of {name_some(given)}, got none. "
                f"Fix: --column {field}=NAME"
            )
