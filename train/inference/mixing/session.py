"""One generation with a mixture: what the anchor has written in each row, and the sources' rows.

It lies in the anchor's cache as a further layer, so what generation does to rows of the cache
(reordering beams, dropping those that have ended) reaches the sources too. Letters: B rows, T
positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from carryon.cache.alignment.growing_text import GrowingText, begin_text
from carryon.cache.errors import InputError
from carryon.train.inference.mixing.source_base import SourceBase
from carryon.train.inference.mixing.source_rows import RowStates, SourceRows


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class AnchorWords:
    """What the tokens of the anchor spell."""

    words: Sequence[bytes | None]
    """[V] bytes of each token; None for those that stand for no text."""
    special: dict[int, bytes]
    """Names of the latter, as a prompt may hold them."""
    start: tuple[int, ...]
    """Tokens that its tokenizer puts before any text."""
    has_prefix: bool
    """Whether the tokenizer puts a blank before any text."""
    stops: frozenset[int]
    """Tokens with which it ends a turn."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prompts:
    """The prompts of a batch, as the sources read them."""

    length: int
    """Positions of the prompts."""
    texts: Sequence[Sequence[GrowingText]] | None = None
    """[rows][sources]; None: what the anchor's tokens spell."""


@dataclass(kw_only=True, slots=True)
class _Row:
    """A row of the batch."""

    texts: Sequence[GrowingText] | None
    """Its prompt, as each source reads it."""
    is_mixed: bool
    num_tokens: int = 0
    last: int = -1
    """Its last token."""
    is_ended: bool = False
    has_text: bool = False


class Session:
    """The rows of one batch; positions are added and then read."""

    def __init__(
        self,
        words: AnchorWords,
        sources: Sequence[SourceBase],
        prompts: Prompts | None,
        *,
        prompt_rows: Sequence[int],
        is_mixed: Sequence[bool],
    ) -> None:
        """Begin with empty rows.

        Args:
            words: of the anchor.
            sources: of the mixture.
            prompts: of the batch. None: all positions are of the prompt.
            prompt_rows: [B] row of `prompts` that each row has.
            is_mixed: [B] whether the sources read it; else it is the anchor's alone.
        """
        self._words = words
        self._length = prompts.length if prompts else None
        texts = prompts.texts if prompts else None
        self._rows = [
            _Row(texts=None if texts is None else texts[at], is_mixed=mixed)
            for at, mixed in zip(prompt_rows, is_mixed, strict=True)
        ]
        self.num_positions = 0
        self.sources = [
            SourceRows(source, [_begin(row, source, number) for row in self._rows])
            for number, source in enumerate(sources if any(is_mixed) else ())
        ]

    @property
    def going(self) -> list[int]:
        """Rows that are mixed and have not ended."""
        return [n for n, row in enumerate(self._rows) if row.is_mixed and not row.is_ended]

    def add(self, tokens: Sequence[Sequence[int]], mask: Sequence[Sequence[int]] | None) -> None:
        """Add positions to all rows.

        Args:
            tokens: [B][T] of the anchor.
            mask: [B][T] 1 for real tokens. None: all are.
        """
        for number, row in enumerate(self._rows):
            more = b""
            for at, token in enumerate(tokens[number]):
                if row.is_mixed and not row.is_ended and (mask is None or mask[number][at]):
                    more += self._spell(row, token, self.num_positions + at)
            if more:
                for source in self.sources:
                    source.add(number, more)
        self.num_positions += len(tokens[0]) if tokens else 0

    def read(self, rows: Sequence[int]) -> list[RowStates]:
        """Return, for each source, its states at the ends of some rows."""
        last = [self._rows[row].last for row in rows]
        return [source.read(rows, last) for source in self.sources]

    def select(self, rows: Sequence[int]) -> None:
        """Keep some rows, in this order; one may be there several times."""
        self._rows = [replace(self._rows[row]) for row in rows]
        for source in self.sources:
            source.select(rows)

    def _spell(self, row: _Row, token: int, position: int) -> bytes:
        """Return what a token adds to a row's text."""
        words, is_prompt = self._words, self._length is None or position < self._length
        at, row.num_tokens, row.last = row.num_tokens, row.num_tokens + 1, token
        if is_prompt and row.texts is not None:
            row.has_text = True
            return b""
        word = words.words[token] if token < len(words.words) else None
        if not is_prompt:
            row.is_ended = token in words.stops
            word = word or b""
        elif word is None:
            is_start = at < len(words.start) and words.start[at] == token
            word = b"" if is_start else words.special.get(token, b"")
        if word and not row.has_text:
            row.has_text = True
            word = word[1:] if words.has_prefix and word.startswith(b" ") else word
        return word


def _begin(row: _Row, source: SourceBase, number: int) -> GrowingText:
    return begin_text(source.start) if row.texts is None else row.texts[number]


class SessionLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer without keys and values, which hands on to a session what is done to rows."""

    session: Session

    def get_seq_length(self) -> int:
        """Return the positions that are cached."""
        return self.session.num_positions

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows."""
        self.session.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep rows."""
        self.session.select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        rows = range(len(self.session._rows))
        self.session.select([row for row in rows for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what the sources have read is not kept.

        Raises:
            InputError: always, but for nothing.
        """
        if tokens_to_remove:
            raise InputError(
                "past_key_values: expected a cache that only grows, as other bases read along, got "
                "one to crop. Fix: generate without assistant_model and prompt_lookup_num_tokens"
            )


def find_session(cache: Cache | None) -> Session | None:
    """Return the session that lies in a cache."""
    layers = [] if cache is None else cache.layers
    found = [layer.session for layer in layers if isinstance(layer, SessionLayer)]
    return found[0] if found else None


def keep_session(cache: Cache | None, session: Session) -> None:
    """Put a session into a cache, behind all other layers."""
    if cache is not None:
        make: Any = SessionLayer
        layer = make()
        layer.session = session
        cache.layers.append(layer)


def host_rows(tensor: Tensor | None) -> list[list[int]] | None:
    """Return a tensor [B, T] as lists."""
    if tensor is None:
        return None
    rows: list[list[int]] = tensor.to(torch.int64).tolist()
    return rows
