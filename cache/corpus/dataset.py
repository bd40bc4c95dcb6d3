"""A corpus: the user's data as samples of limited length, counted and fingerprinted.

Sources are cut into shards, which processes convert to Arrow files of samples. Memory is flat in
the size of the data. The files are kept in a cache under a digest of everything that determines
them, so that a second run over the same data finds its samples.
"""

import gc
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carryon.cache.corpus.conversion import Converter, ShardResult
from carryon.cache.corpus.files import plan_shards
from carryon.cache.corpus.reading.cache_folder import cache_folder, writing_cache
from carryon.cache.corpus.report import Report, Tally
from carryon.cache.corpus.rows import Data, Shard, Source
from carryon.cache.corpus.samples import Sample, SampleTable
from carryon.cache.corpus.sources import open_sources
from carryon.cache.corpus.tokenize import get_backend
from carryon.cache.corpus.unique_ids import refuse_equal_ids
from carryon.cache.errors import InputError
from carryon.cache.files.documents import read_object
from carryon.cache.progress import Progress
from carryon.cache.settings import CorpusSettings, DataSettings
from carryon.cache.versions import installed_version

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Corpus", "Sample", "SampleTable", "read_corpus"]
logger = logging.getLogger(__name__)

_FORMAT = 2
"""Of the cache: raised when the same data would give other samples."""
_SUMMARY = "summary.json"
_PARTIAL = ".partial-"
_ABANDONED_S = 24 * 3600.0
_GROUP_BYTES = 1 << 20
_CODE = ("carryon.cache.corpus", "tokenizers", "transformers", "jinja2")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Corpus:
    """All samples, in the order of the data."""

    samples: SampleTable
    fingerprint: str
    """SHA-256, hex, over everything in the samples, in order."""
    files: list[dict[str, Any]]
    """`name` (without folder), `bytes` and `sha256` of each source."""
    counts: dict[str, int]
    """`records` read; `samples`, `tokens` and `supervised_tokens` kept."""
    kinds: dict[str, int]
    """Samples of each kind of record."""
    report: Report
    skipped: list[dict[str, str]]
    """`where` and `problem` of each row that was left out."""


def read_corpus(
    data: Data,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    settings: CorpusSettings,
    max_tokens: int,
    data_settings: DataSettings | None = None,
    held_out: Collection[str] = (),
    end_tokens: Sequence[int] = (),
    vocab_size: int | None = None,
    folder: Path | None = None,
) -> Corpus:
    """Read data into samples of at most `max_tokens` tokens.

    Args:
        data: files, folders, data sets on the hub, or rows: dicts as in a JSON line.
        tokenizer: of the base, with the chat template to use.
        settings: of the corpus; see `resolve_settings`.
        max_tokens: of a sample.
        data_settings: how the data are read. None: defaults.
        held_out: ids of records or samples to hold out, besides those marked in the data.
        end_tokens: ids at which generation with the base stops. Empty: the tokenizer's
            end-of-text token.
        vocab_size: rows of the base's embedding. None: the tokenizer's length.
        folder: where rows in memory, tables and samples are kept. None: `cache_folder()`.

    Raises:
        MissingError: a path does not exist.
        InputError: a record is wrong, or a setting does not fit it (the text names the record),
            or no sample is left.
        DiskFullError: the cache cannot be written.
    """
    if max_tokens < 2:
        raise InputError(f"max_tokens: expected 2 or more tokens, got {max_tokens}")
    data_settings, folder = data_settings or DataSettings(), folder or cache_folder()
    sources = open_sources(data, data_settings, folder=folder)
    how: dict[str, Any] = {
        "settings": settings,
        "data_settings": data_settings,
        "max_tokens": max_tokens,
        "held_out": frozenset(held_out),
        "end_tokens": list(end_tokens),
        "vocab_size": vocab_size,
    }
    converter = partial(Converter, tokenizer, **how)
    place = folder / "samples" / _digest_inputs(sources, tokenizer, **how)[:32]
    if not _is_whole(place):
        with writing_cache(folder):
            _convert_all(sources, converter, place, num_workers=data_settings.tokenizer_workers)
    return _open(place, sources)


def _digest_inputs(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    settings: CorpusSettings,
    data_settings: DataSettings,
    max_tokens: int,
    held_out: Collection[str],
    end_tokens: Sequence[int],
    vocab_size: int | None,
) -> str:
    """Return the digest of all that determines the samples: sources, and the converter's arguments.

    Equal digests share a folder of the cache, so a new argument of the converter belongs here.
    """
    facts = {
        "sources": [_content(source) for source in sources],
        "settings": settings.to_dict(),
        "rows": [data_settings.bad_rows, data_settings.drop_unfit],
        "numbers": [max_tokens, vocab_size, *end_tokens],
        "held_out": sorted(held_out),
        "counts": 2,  # raised when what is counted changes
        "tokenizer": _tokenizer_rules(tokenizer),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _content(source: Source) -> list[Any]:
    """Return what determines the samples of a source: its content, and its name in their ids."""
    names = (source.name, source.kind, source.is_held_out, source.expected)
    return [source.sha256, *names, sorted(source.columns.items())]


def _tokenizer_rules(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    rules = hashlib.sha256(get_backend(tokenizer).to_str().encode()).hexdigest()
    letter = tokenizer("a").input_ids
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    versions = [installed_version(name) for name in _CODE[1:]]
    return [rules, letter, special, tokenizer.chat_template, versions, _FORMAT]


def _convert_all(
    sources: Sequence[Source],
    make_converter: Callable[[], Converter],
    place: Path,
    *,
    num_workers: int,
) -> None:
    """Convert all shards into files in a folder beside `place`, which then gets its name."""
    groups = _group(plan_shards(sources))
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place.parent)
    partial_place = Path(tempfile.mkdtemp(prefix=f"{place.name}{_PARTIAL}", dir=place.parent))
    try:
        results = _run(groups, make_converter(), partial_place, num_workers=num_workers)
        tally, counts, kinds = Tally(), Counter[str](), Counter[str]()
        skipped: list[dict[str, str]] = []
        num_bytes = sum(source.num_bytes for source in sources)
        with Progress(num_bytes, name="tokenize", unit="B") as progress:
            for shards, result in zip(groups, results, strict=True):
                tally.merge(result.tally)
                counts.update(result.counts)
                kinds.update(result.kinds)
                skipped.extend(result.skipped)
                progress.update(sum(map(_shard_bytes, shards)))
        report = tally.report()
        if not counts["samples"]:
            raise _empty(report, [source.name for source in sources])
        paths = [_shard_path(partial_place, number) for number in range(len(groups))]
        table = SampleTable.open(paths)
        refuse_equal_ids(table, [shard for shards in groups for shard in shards])
        summary = {
            "fingerprint": table.digest(),
            "counts": {"records": tally.records, **counts},
            "kinds": dict(kinds),
            "report": report.to_dict(),
            "skipped": skipped,
            "sizes": [path.stat().st_size for path in paths],
        }
        (partial_place / _SUMMARY).write_text(json.dumps(summary))
        _publish(partial_place, place)
    finally:
        shutil.rmtree(partial_place, ignore_errors=True)


def _publish(partial_place: Path, place: Path) -> None:
    """Give a finished folder its name, unless another process has made the same one."""
    try:
        if not _is_whole(place):
            shutil.rmtree(place, ignore_errors=True)  # damaged
            partial_place.rename(place)
    except OSError:
        if not _is_whole(place):  # made in the meantime
            raise


def _sweep(folder: Path) -> None:
    """Remove what killed processes left: half-made folders that nobody has changed for a day."""
    for path in folder.glob(f"*{_PARTIAL}*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)


def _group(shards: Sequence[Shard]) -> list[list[Shard]]:
    """Return consecutive shards in groups that are worth a file: many small files make few."""
    groups: list[list[Shard]] = []
    num_bytes = 0
    for shard in shards:
        if not groups or num_bytes >= _GROUP_BYTES:
            groups.append([])
            num_bytes = 0
        groups[-1].append(shard)
        num_bytes += _shard_bytes(shard)
    return groups


def _run(
    groups: Sequence[Sequence[Shard]], converter: Converter, folder: Path, *, num_workers: int
) -> Iterator[ShardResult]:
    """Yield the result of each group of shards, in order, as several processes convert them."""
    num_workers = min(num_workers or _num_cores(), len(groups))
    paths = [_shard_path(folder, number) for number in range(len(groups))]
    if num_workers <= 1 or sys.platform != "linux" or "fork" not in get_all_start_methods():
        # a spawned process would run the user's script again
        yield from map(converter.convert, groups, paths)
        return
    global _converter
    _converter = converter  # the processes inherit it
    with (
        _forking(),
        ProcessPoolExecutor(
            num_workers, mp_context=get_context("fork"), initializer=_begin_worker
        ) as pool,
    ):
        try:
            yield from pool.map(_convert, groups, paths)
        except BrokenProcessPool as error:
            raise InputError(
                "a process that tokenizes was killed, perhaps as memory ran out. Fix: "
                "--tokenizer-workers 1"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            _converter = None


_converter: Converter | None = None


def _num_cores() -> int:
    """Return the cores that this process may use."""
    may_use = getattr(os, "sched_getaffinity", None)  # not on every system
    return len(may_use(0)) if may_use else os.cpu_count() or 1


def _convert(shards: Sequence[Shard], path: Path) -> ShardResult:
    assert _converter is not None
    return _converter.convert(shards, path)


def _begin_worker() -> None:
    gc.freeze()  # what the parent imported is not looked through again
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which ends the pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has a core


@contextmanager
def _forking() -> Iterator[None]:
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that a fork leaves behind; the workers use none of theirs
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.arrow"


def _shard_bytes(shard: Shard) -> int:
    source = shard.source
    if source.kind == "json lines" and not source.packing:
        return shard.stop - shard.start
    if source.kind == "table":
        rows = max(source.marks[-1][0], 1)
        return source.num_bytes * (shard.stop - shard.start) // rows
    return source.num_bytes // shard.of


def _is_whole(place: Path) -> bool:
    """Tell whether a folder of the cache holds all its files, of the sizes they were written in."""
    try:
        sizes = read_object(place / _SUMMARY)["sizes"]
        found = [_shard_path(place, number).stat().st_size for number in range(len(sizes))]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(sizes == found)


def _open(place: Path, sources: Sequence[Source]) -> Corpus:
    summary: Mapping[str, Any] = read_object(place / _SUMMARY)
    os.utime(place)  # when it was last used
    numbers = range(len(summary["sizes"]))
    return Corpus(
        samples=SampleTable.open(_shard_path(place, number) for number in numbers),
        fingerprint=summary["fingerprint"],
        files=[source.facts for source in sources],
        counts=summary["counts"],
        kinds=summary["kinds"],
        report=Report.from_dict(summary["report"]),
        skipped=summary["skipped"],
    )


def _empty(report: Report, names: Sequence[str]) -> InputError:
    where = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    if not report.records:
        return InputError(f"data: expected at least one record, got none in {where or 'no file'}")
    losses = "; ".join(f"{loss.reason}: {loss.records:,}" for loss in report.losses)
    first = report.losses[0] if report.losses else None
    fix = f". Fix: {first.fix}" if first else ""
    return InputError(
        f"{where or 'data'}: expected records with training targets, got none in "
        f"{report.records:,} records ({losses}){fix}"
    )
