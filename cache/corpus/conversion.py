"""Rows as samples: read, tokenized, cut to length, and every loss counted.

Rows go through in batches: all their texts are rendered, then tokenized in one call, then marked.
"""

import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carryon.cache.corpus.chat.chat_template import ChatTemplate, UnfitError
from carryon.cache.corpus.files import read_shard
from carryon.cache.corpus.lengths import Cutter
from carryon.cache.corpus.record_tokens import KINDS, Asks, Piece, RecordTokens
from carryon.cache.corpus.records import Pair, Record, Text, marks_held_out, read_record
from carryon.cache.corpus.report import LOST_HELD_OUT, Tally
from carryon.cache.corpus.rows import BadRow, Row, Shard
from carryon.cache.corpus.samples import Sample, SampleWriter
from carryon.cache.corpus.tokenize import WINDOW_CHARS, Encoder, Request, Tokens
from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings, DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS, _BATCH_BYTES = 64, 1 << 18


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardResult:
    """Counts of the samples of a few shards, whose file is written."""

    tally: Tally
    counts: Mapping[str, int]
    """`samples`, `tokens` and `supervised_tokens`."""
    kinds: Mapping[str, int]
    """Samples of each kind of record."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """`where` and `problem` of each row that was left out."""


class Converter:
    """Converts shards of rows to files of samples."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        settings: CorpusSettings,
        data_settings: DataSettings,
        max_tokens: int,
        held_out: Container[str],
        end_tokens: Sequence[int],
        vocab_size: int | None,
    ) -> None:
        """Prepare tokenizer and chat template; arguments as of `read_corpus`."""
        self._may_skip = {
            _BAD: data_settings.bad_rows == "skip",
            _UNFIT: data_settings.drop_unfit,
        }
        self._encoder = encoder = Encoder(tokenizer)
        template = ChatTemplate(
            tokenizer,
            variables=parse_variables(settings.chat_template_kwargs),
            today=settings.template_date,
            end_tokens=end_tokens,
        )
        ends = [end for end in (*end_tokens, tokenizer.eos_token_id) if end is not None]
        self._tokens = RecordTokens(
            encoder, template, settings=settings, max_tokens=max_tokens, end_tokens=ends
        )
        self._cutter = Cutter(
            max_tokens=max_tokens,
            policy=settings.long,
            start_pieces=settings.start_pieces,
            encoder=encoder,
            held_out=held_out,
            vocab_size=vocab_size or len(tokenizer),
        )

    def convert(self, shards: Iterable[Shard], path: Path) -> ShardResult:
        """Write the samples of consecutive shards to an Arrow file.

        Raises:
            InputError: a row is wrong, or unfit for the chat template, and is not to be skipped;
                or a setting does not fit a record. The text names the row.
        """
        tally, counts, kinds = Tally(), Counter[str](), Counter[str]()
        skipped: list[dict[str, str]] = []
        with SampleWriter(path) as writer:
            for rows in _batches(chain.from_iterable(map(read_shard, shards))):
                for kind, sample in self.convert_rows(rows, tally, skipped):
                    writer.write(sample)
                    counts["samples"] += 1
                    counts["supervised_tokens"] += int(sample.loss_mask.sum())
                    kinds[kind] += 1
        counts["tokens"] = tally.tokens
        return ShardResult(tally=tally, counts=counts, kinds=kinds, skipped=skipped)

    def convert_rows(
        self, rows: Sequence[Row | BadRow], tally: Tally, skipped: list[dict[str, str]]
    ) -> Iterator[tuple[str, Sample]]:
        """Yield the kind of each row's record and its samples; a row left out is listed.

        Raises:
            InputError: as `convert`.
        """
        jobs = [_Job(row, self._tokens) for row in rows]
        while waiting := [job for job in jobs if job.request]:
            found = self._encoder.encode_all([job.request for job in waiting if job.request])
            for job, tokens in zip(waiting, found, strict=True):
                job.go_on(tokens)
        for job in jobs:
            job.tally.records = 1
            try:
                for sample in self._samples(job):
                    job.tally.kept = 1
                    job.tally.tokens += len(sample.tokens)
                    yield KINDS[type(job.record.content)][0], sample
            except _RowError as error:
                if not self._may_skip[error.reason]:
                    raise InputError(f"{error.where}: {error.problem}{error.other_fix}") from error
                job.tally.count(error.reason, where=error.where)
                skipped.append({"where": error.where, "problem": error.problem})
            except InputError as error:
                where = job.record.where
                problem = str(error).removeprefix(f"{where}: ")
                raise InputError(f"{where}: {problem}") from error
            if not job.tally.kept and (job.is_held_out or job.name in self._cutter.held_out):
                job.tally.count(LOST_HELD_OUT, where=job.where)
            tally.merge(job.tally)

    def _samples(self, job: "_Job") -> Iterator[Sample]:
        if job.error:
            raise job.error
        record, content = job.record, job.record.content
        if isinstance(content, Text):
            text, windows = content.text, iter([piece.tokens for piece in job.pieces])
            if len(text) > WINDOW_CHARS:
                windows = self._encoder.iter_encode(text)
            elif not job.pieces:
                return
            yield from self._cutter.cut_text(record, windows, len(text), job.tally)
            return
        cut = self._cutter.cut
        samples = [sample for piece in job.pieces for sample in cut(record, piece, job.tally)]
        if isinstance(content, Pair) and len({sample.role for sample in samples}) < 2:
            job.tally.count("no target", where=record.where)
            return
        yield from samples


class _Job:
    """A row on its way to samples: it waits for the tokens of `request`, until that is None."""

    def __init__(self, row: Row | BadRow, tokens: RecordTokens) -> None:
        self.tally, self.pieces = Tally(), list[Piece]()
        self.request: Request | None = None
        self.error: Exception | None = None
        self.where, self.name = row.where, ""
        self.is_held_out = isinstance(row, Row) and marks_held_out(row)
        self.record: Record
        self._asks: Asks
        try:
            self.record = record = _read(row)
            self.name, self.is_held_out = record.id, record.is_held_out
            content = record.content
            if isinstance(content, Text) and len(content.text) > WINDOW_CHARS:  # in windows
                tokens.check_mask(record)
                return
            self._asks = tokens.pieces(record, self.tally)
        except (_RowError, InputError) as error:
            self.error = error
            return
        self.go_on(None)

    def go_on(self, tokens: Tokens | None) -> None:
        """Take the tokens that were asked for, and ask for the next."""
        self.request = None
        try:
            self.request = next(self._asks) if tokens is None else self._asks.send(tokens)
        except StopIteration as end:
            self.pieces = end.value
        except UnfitError as error:
            self.error = _RowError(_UNFIT, self.record.where, str(error))
        except InputError as error:
            self.error = error


_BAD, _UNFIT = "bad row", "unfit for the chat template"


class _RowError(Exception):
    """A row without samples."""

    def __init__(self, reason: str, where: str, problem: str) -> None:
        super().__init__(reason, where, problem)
        self.reason, self.where, self.problem = reason, where, problem

    @property
    def other_fix(self) -> str:
        """Return the option that leaves the row out, as the end of an error text."""
        if self.reason != _BAD:
            return ""
        begin = ", or" if ". Fix: " in self.problem else ". Fix: correct it, or"
        return f"{begin} --bad-rows skip"


def parse_variables(options: Sequence[str]) -> dict[str, Any]:
    """Return NAME=VALUE options as values: JSON where it is JSON, else a text.

    Raises:
        InputError: an option is not of this form.
    """
    variables: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(
                f"chat_template_kwargs: expected NAME=VALUE, got {option!r}. Fix: "
                "--chat-template-kwargs enable_thinking=false"
            )
        try:
            variables[name] = json.loads(value)
        except ValueError:
            variables[name] = value
    return variables


def _read(row: Row | BadRow) -> Record:
    if isinstance(row, BadRow):
        raise _RowError(_BAD, row.where, row.problem)
    try:
        return read_record(row)
    except InputError as error:
        problem = str(error).removeprefix(f"{row.where}: ")
        raise _RowError(_BAD, row.where, problem) from error


def _batches(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    batch: list[Row | BadRow] = []
    num_bytes = 0
    for row in rows:
        batch.append(row)
        num_bytes += row.num_bytes
        if len(batch) == _BATCH_ROWS or num_bytes > _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch
