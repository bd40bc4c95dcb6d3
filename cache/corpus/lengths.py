"""Samples of limited length: pieces and texts are cut off, split, left out or refused."""

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.record_tokens import Piece
from carryon.cache.corpus.records import Record
from carryon.cache.corpus.report import Tally
from carryon.cache.corpus.samples import Sample, hash_id
from carryon.cache.corpus.tokenize import Encoder, Tokens, join
from carryon.cache.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutter:
    """Makes samples of at most `max_tokens` tokens."""

    max_tokens: int
    policy: str
    """`long` of CorpusSettings."""
    start_pieces: bool
    encoder: Encoder
    held_out: Container[str]
    """Ids of records or samples to hold out."""
    vocab_size: int
    """Rows of the base's embedding."""

    def cut(self, record: Record, piece: Piece, tally: Tally) -> Iterator[Sample]:
        """Yield a piece as samples.

        Raises:
            InputError: it is too long and not to be cut, or has a token that the base lacks.
        """
        num_tokens, limit, policy = len(piece.tokens.ids), self.max_tokens, self.policy
        count = partial(tally.count, where=record.where)
        ranges = [range(num_tokens)]
        if num_tokens > limit:
            if policy == "error":
                raise self._too_long(record, num_tokens)
            if policy == "skip":
                count("too long, left out", tokens=num_tokens)
                return
            if policy == "split":
                count("split into pieces")
                starts = range(0, num_tokens, limit)
                ranges = [range(at, min(at + limit, num_tokens)) for at in starts]
            else:
                count("too long, cut off", tokens=num_tokens - limit)
                ranges = [range(limit)]
        for number, part in enumerate(ranges):
            name = record.id + piece.suffix + (f"#{number}" if len(ranges) > 1 else "")
            loss_mask = piece.loss_mask[part.start : part.stop]
            sample = self._sample(
                record, name, piece.tokens.part(part.start, part.stop), loss_mask, role=piece.role
            )
            if sample.loss_mask.any():
                yield sample
            else:
                count("no target", tokens=len(sample.tokens), records=int(len(ranges) == 1))

    def cut_text(
        self, record: Record, windows: Iterable[Tokens], num_chars: int, tally: Tally
    ) -> Iterator[Sample]:
        """Yield a text as samples, with a few windows of it in memory.

        Args:
            record: of the text.
            windows: tokens of consecutive parts of the text.
            num_chars: of the text.
            tally: counts what is lost.

        Raises:
            InputError: as `cut`.
        """
        limit, policy = self.max_tokens, "split" if self.policy == "auto" else self.policy
        start = self.encoder.start if self.start_pieces else self.encoder.start[:0]
        number, num_tokens = 0, 0
        kept = Tokens.at(start[:0], 0)
        for tokens in self._framed(windows, num_chars):
            num_tokens += len(tokens.ids)
            if len(kept.ids) < limit or policy == "split":
                kept = join([kept, tokens]) if len(kept.ids) else tokens
            while policy == "split" and len(kept.ids) > limit:
                yield self._text_sample(record, f"#{number}", kept.part(0, limit))
                place = int(kept.ends[limit - 1])
                kept = join([Tokens.at(start, place), kept.part(limit, len(kept.ids))])
                number += 1
        count = partial(tally.count, where=record.where)
        if num_tokens > limit and policy in ("skip", "error"):
            if policy == "error":
                raise self._too_long(record, num_tokens)
            count("too long, left out", tokens=num_tokens)
            return
        if num_tokens > limit and policy == "truncate":
            count("too long, cut off", tokens=num_tokens - limit)
            kept = kept.part(0, limit)
        if number:
            count("split into pieces")
        sample = self._text_sample(record, f"#{number}" if number else "", kept)
        if sample.loss_mask.any():
            yield sample
        elif not number:
            count("no target", tokens=len(sample.tokens))

    def _framed(self, windows: Iterable[Tokens], num_chars: int) -> Iterator[Tokens]:
        """Yield the tokens of a text with start tokens and end-of-text token."""
        start, end = self.encoder.start, self.encoder.required_end
        last = -1
        for number, tokens in enumerate(windows):
            has_start = tokens.ids[: len(start)].tolist() == start.tolist()
            if number == 0 and len(start) and not has_start:
                yield Tokens.at(start, 0)
            if len(tokens.ids):
                last = int(tokens.ids[-1])
                yield tokens
        if last != end:
            yield Tokens.at(np.array([end], dtype=np.int32), num_chars)

    def _text_sample(self, record: Record, suffix: str, tokens: Tokens) -> Sample:
        loss_mask = np.ones(len(tokens.ids), dtype=np.uint8)
        start = self.encoder.start
        if len(start) and tokens.ids[: len(start)].tolist() == start.tolist():
            loss_mask[: len(start)] = 0
        return self._sample(record, record.id + suffix, tokens, loss_mask, role=0)

    def _sample(
        self,
        record: Record,
        name: str,
        tokens: Tokens,
        loss_mask: NDArray[np.uint8],
        *,
        role: int,
    ) -> Sample:
        if len(tokens.ids) and (largest := int(tokens.ids.max())) >= self.vocab_size:
            raise InputError(
                f"sample {name!r}: token {self.encoder.name_of(largest)!r}: expected an id below "
                f"{self.vocab_size}, the rows of the base's embedding, got {largest}. Fix: use "
                "the base's own tokenizer and chat template"
            )
        loss_mask = loss_mask.copy()
        loss_mask[:1] = 0  # no token before it could predict it
        return Sample(
            id=name,
            tokens=tokens.ids,
            loss_mask=loss_mask,
            char_end=tokens.ends,
            is_held_out=record.is_held_out or record.id in self.held_out or name in self.held_out,
            group=hash_id(record.half),
            role=role,
        )

    def _too_long(self, record: Record, num_tokens: int) -> InputError:
        return InputError(
            f"sample {record.id!r}: expected at most {self.max_tokens} tokens, got {num_tokens}: "
            "shorten it, raise max_tokens, or set long to truncate, split or skip"
        )
