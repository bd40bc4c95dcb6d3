"""A corpus: the user's data as samples of limited length, counted and fingerprinted.

files.py reads rows, records.py checks them, chat_template.py marks target characters, tokenize.py
makes tokens. Here long records are cut, and records without a target are left out.
Letters: T tokens of a sample.
"""

import hashlib
import struct
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.chat_template import ChatTemplate
from carryon.cache.corpus.files import Data, open_data
from carryon.cache.corpus.records import Record, check_id, read_records
from carryon.cache.corpus.tokenize import TokenRows, encode, make_encoder
from carryon.cache.errors import InputError
from carryon.cache.progress import Progress
from carryon.cache.settings import CorpusSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LongPolicy = Literal["truncate", "split", "skip", "error"]

_BATCH_BYTES = 1 << 20  # of records that are tokenized in one (threaded) call


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One document or conversation, or a piece of one."""

    id: str
    """Unique; of a piece, the record's id with #0, #1, ..."""
    tokens: NDArray[np.int32]
    """[T] int32."""
    loss_mask: NDArray[np.uint8]
    """[T] uint8: 1 where the token is a training target."""
    char_end: NDArray[np.int32]
    """[T] int32: end of the token in the record's text, in characters (code points). Never
    decreases; a token that is only some bytes of a character ends where the character ends. The
    text is the rendered conversation, or prompt + completion, or the text."""
    is_held_out: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Corpus:
    """All samples, in the order of the data."""

    samples: list[Sample]
    fingerprint: str
    """SHA-256, hex, over ids, tokens, masks, character ends and held-out flags, in order."""
    files: list[dict[str, Any]]
    """`name` (without folder), `bytes` and `sha256` of each file; empty for rows in memory."""
    counts: dict[str, int]
    """`records` read; `samples`, `tokens` and `supervised_tokens` kept; records `truncated` and
    the `truncated_tokens` they lost; records `split`; records left out as too long
    (`skipped_long`); samples and pieces left out without a target (`skipped_unsupervised`)."""


def read_corpus(
    data: Data,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    settings: CorpusSettings,
    max_tokens: int,
    held_out: Container[str] = (),
) -> Corpus:
    """Read data into samples of at most `max_tokens` tokens.

    Args:
        data: files and folders, or rows: dicts as in a JSON line.
        tokenizer: of the base.
        settings: of the corpus.
        max_tokens: of a sample.
        held_out: ids of samples to hold out, besides those marked in the data.

    Raises:
        MissingError: a path does not exist.
        InputError: a record is wrong, or a setting does not fit it (the text names the record),
            or no sample is left.
        MissingExtraError: a Parquet file, and pyarrow is not installed.
    """
    if max_tokens < 2:
        raise InputError(f"max_tokens: expected 2 or more tokens, got {max_tokens}")
    encoder, template = make_encoder(tokenizer), ChatTemplate(tokenizer)
    files, rows = open_data(data)
    counts: Counter[str] = Counter()
    samples: list[Sample] = []
    num_bytes = sum(file["bytes"] for file in files)
    with Progress(num_bytes, name="tokenize", unit="B") as progress:
        for records in _batches(read_records(rows)):
            renderings = [template.render(record, mask=settings.mask) for record in records]
            for record, tokens in zip(records, encode(encoder, renderings), strict=True):
                kept, tally = _cut(
                    record, tokens, long=settings.long, max_tokens=max_tokens, held_out=held_out
                )
                samples.extend(kept)
                counts.update(tally)
            progress.update(sum(record.num_bytes for record in records))
    if not samples:
        raise _empty(counts, [file["name"] for file in files])
    _refuse_equal_ids(samples)
    return Corpus(
        samples=samples,
        fingerprint=_fingerprint(samples),
        files=files,
        counts=dict(counts),
    )


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    num_bytes = 0
    for record in records:
        batch.append(record)
        num_bytes += record.num_bytes
        if num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _cut(
    record: Record,
    rows: TokenRows,
    *,
    long: LongPolicy,
    max_tokens: int,
    held_out: Container[str],
) -> tuple[list[Sample], dict[str, int]]:
    """Return the samples of a record, and their counts."""
    num_tokens = len(rows.tokens)
    is_long = num_tokens > max_tokens
    if is_long and long == "error":
        raise InputError(
            f"{record.where}: sample {record.id!r}: expected at most {max_tokens} tokens, got "
            f"{num_tokens}: shorten it, raise max_tokens, or set long to truncate, split or skip"
        )
    ranges = cut_ranges(num_tokens, max_tokens=max_tokens, long=long)
    kept = []
    for index, piece in enumerate(ranges):
        loss_mask = rows.loss_mask[piece.start : piece.stop].copy()
        loss_mask[:1] = 0  # no token before it could predict it
        if not loss_mask.any():
            continue
        name = record.id
        if len(ranges) > 1:
            where = f"{record.where}: id of piece {index} of a split sample"
            name = check_id(f"{record.id}#{index}", where=where)
        kept.append(
            Sample(
                id=name,
                tokens=rows.tokens[piece.start : piece.stop].copy(),
                loss_mask=loss_mask,
                char_end=rows.char_end[piece.start : piece.stop].copy(),
                is_held_out=record.is_held_out or name in held_out,
            )
        )
    num_cut = num_tokens - max_tokens if is_long and long == "truncate" else 0
    return kept, {
        "records": 1,
        "samples": len(kept),
        "tokens": sum(len(sample.tokens) for sample in kept),
        "supervised_tokens": sum(int(sample.loss_mask.sum()) for sample in kept),
        "truncated": int(num_cut > 0),
        "truncated_tokens": num_cut,
        "split": int(len(ranges) > 1),
        "skipped_long": int(not ranges),
        "skipped_unsupervised": len(ranges) - len(kept),
    }


def cut_ranges(num_tokens: int, *, max_tokens: int, long: LongPolicy) -> list[range]:
    """Return the range of tokens of each piece of a sample; none if it is left out. Pure."""
    if num_tokens <= max_tokens:
        return [range(num_tokens)]
    if long == "split":
        starts = range(0, num_tokens, max_tokens)
        return [range(start, min(start + max_tokens, num_tokens)) for start in starts]
    return [range(max_tokens)] if long == "truncate" else []


def _empty(counts: Counter[str], names: Sequence[str]) -> InputError:
    where = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    if not counts["records"]:
        return InputError(f"data: expected at least one record, got none in {where or 'no file'}")
    return InputError(
        f"{where or 'data'}: expected records with training targets, but of {counts['records']} "
        f"{counts['skipped_long']} are too long and {counts['skipped_unsupervised']} have no "
        "target. Fix: check mask, max_tokens and the records"
    )


def _refuse_equal_ids(samples: Sequence[Sample]) -> None:
    # records have unique ids, but "a#1" may be a record and a piece of record "a"
    identifier, count = Counter(sample.id for sample in samples).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"sample {identifier!r}: id of a record and of a piece of a split record: rename one"
        )


def _fingerprint(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        name = sample.id.encode()
        digest.update(struct.pack("<HQ?", len(name), len(sample.tokens), sample.is_held_out))
        digest.update(name)
        digest.update(sample.tokens.astype("<i4", copy=False).tobytes())
        digest.update(sample.loss_mask.tobytes())
        digest.update(sample.char_end.astype("<i4", copy=False).tobytes())
    return digest.hexdigest()
