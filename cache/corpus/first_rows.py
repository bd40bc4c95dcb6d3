"""The first rows of each kind of data as samples, for people to look at."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from carryon.cache.corpus.conversion import Converter
from carryon.cache.corpus.files import plan_shards, read_shard
from carryon.cache.corpus.reading.cache_folder import cache_folder
from carryon.cache.corpus.report import Report, Tally
from carryon.cache.corpus.rows import BadRow, Data, Row, Source
from carryon.cache.corpus.samples import Sample
from carryon.cache.corpus.sources import open_sources
from carryon.cache.settings import CorpusSettings, DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SAMPLES = 8
"""Samples kept of one record; the others are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordSamples:
    """A record's samples."""

    kind: str
    where: str
    samples: Sequence[Sample]
    num_more: int
    """Samples that were made of it and are not kept."""


def read_first(
    data: Data,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    num_rows: int,
    settings: CorpusSettings,
    max_tokens: int,
    data_settings: DataSettings,
    end_tokens: Sequence[int] = (),
    vocab_size: int | None = None,
    folder: Path | None = None,
) -> tuple[list[RecordSamples], Report]:
    """Convert the first rows of each kind of record, and report what became of these rows.

    Arguments are those of `read_corpus`; of each kind `num_rows` are read, in the order of the
    data. Samples are not kept; rows in memory and tables are, in `folder`, for an extraction.

    Raises:
        MissingError, InputError, DiskFullError: as `read_corpus`, for these rows.
    """
    converter = Converter(
        tokenizer,
        settings=settings,
        data_settings=data_settings,
        max_tokens=max_tokens,
        held_out=(),
        end_tokens=end_tokens,
        vocab_size=vocab_size,
    )
    tally, records = Tally(), list[RecordSamples]()
    sources = open_sources(data, data_settings, folder=folder or cache_folder())
    for row in _iter_first(sources, num_rows):
        kind, samples, num_more = "", list[Sample](), 0
        for kind, sample in converter.convert_rows([row], tally, []):  # noqa: B007
            if len(samples) < MAX_SAMPLES:
                samples.append(sample)
            else:
                num_more += 1
        if samples:
            records.append(
                RecordSamples(kind=kind, where=row.where, samples=samples, num_more=num_more)
            )
    return records, tally.report()


def _iter_first(sources: Sequence[Source], num_rows: int) -> Iterator[Row | BadRow]:
    """Yield the first rows of each kind; a source has one kind."""
    seen: Counter[str] = Counter()
    for source in sources:
        for shard in plan_shards([source]):
            if seen[source.expected] >= num_rows:
                break
            for row in read_shard(shard):
                seen[source.expected] += 1
                yield row
                if seen[source.expected] >= num_rows:
                    break
