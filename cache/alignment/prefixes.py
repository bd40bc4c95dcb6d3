"""Tokens of every beginning of a text, each as if nothing followed.

The tokens of a beginning are those of the whole text up to a stable boundary, and from there the
tokens of its last few words, which are looked up in a cache. Only where the two differ from the
whole text do new tokens come in. Letters: T tokens of a text, E beginnings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.alignment.boundaries import BoundaryRules
from carryon.cache.corpus.tokenize import Encoder
from carryon.cache.errors import InputError

_MAX_CACHED = 1 << 20
_MAX_CACHED_CHARS = 64


class NotStableError(InputError):
    """A token that was taken for stable is another one in the longer text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """Tokens of a beginning of a text: some of the whole text's, then others."""

    num_shared: int
    """Tokens of the whole text that it begins with."""
    others: tuple[int, ...]
    """Ids of the tokens behind them."""
    num_stable: int
    """Tokens that no later text can change, at most `num_shared`."""
    stable_end: int
    """Where the last of them ends, in characters."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Prefixes:
    """A text's tokens and those of its beginnings."""

    tokens: NDArray[np.int32]
    """[T] of the whole text."""
    ends: list[int]
    """[E] characters of each beginning, ascending."""
    found: list[Prefix]
    """[E] its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tail:
    """Tokens of the last words of a beginning."""

    ids: tuple[int, ...]
    num_stable: int
    stable_end: int
    """In characters of the tail."""
    is_sure: bool
    """Whether a boundary was found; else the tail has to begin earlier."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Whole:
    """A text as it is tokenized, with the boundaries that tails may begin at."""

    text: str
    ids: list[int]
    is_next: bool
    bounds: list[int]
    """Characters where a piece begins, ascending from 0."""
    firsts: list[int]
    """Index of the first token of each piece."""


class PrefixTokenizer:
    """Tokenizes beginnings of texts; keeps the tokens of tails."""

    def __init__(self, encoder: Encoder, rules: BoundaryRules) -> None:
        """Start with an empty cache."""
        self._encoder, self._rules = encoder, rules
        self._cache: dict[tuple[bool, str], _Tail] = {}

    def tokenize(self, text: str, ends: Iterable[int], *, is_next: bool) -> Prefixes:
        """Return the tokens of a text and of its beginnings.

        Args:
            text: that no token reaches out of.
            ends: characters of the beginnings, more than 0.
            is_next: whether it continues another text.

        Raises:
            NotStableError: a token taken for stable is not one of the whole text.
        """
        whole, wanted = self._read_whole(text, is_next=is_next), sorted(set(ends))
        opened = self._opened(text) if self._rules.added_starts else {}
        numbers = np.searchsorted(whole.bounds, wanted).tolist()
        steps = 1 if self._rules.has_pieces else 0
        places = [max(number - 1 - steps, 0) for number in numbers]
        for index, end in enumerate(wanted):
            while places[index] and whole.bounds[places[index]] >= opened.get(end, end):
                places[index] -= 1
            if end in opened:
                places[index] = max(places[index] - steps, 0)
        waiting = list(range(len(wanted)))
        found: list[Prefix] = [_EMPTY] * len(wanted)
        while waiting:
            starts = [whole.bounds[places[index]] for index in waiting]
            tails = self._tails(
                whole, [(s, wanted[i]) for s, i in zip(starts, waiting, strict=True)]
            )
            again = []
            for index, start, tail in zip(waiting, starts, tails, strict=True):
                if tail.is_sure or not places[index]:
                    found[index] = _join(whole, places[index], start, tail, wanted[index])
                else:
                    places[index] = max(2 * places[index] - numbers[index], 0)
                    again.append(index)
            waiting = again
        return Prefixes(tokens=np.array(whole.ids, dtype=np.int32), ends=wanted, found=found)

    def _read_whole(self, text: str, *, is_next: bool) -> _Whole:
        encoding = self._encoder.backend(is_next=is_next).encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        offsets: list[tuple[int, int]] = encoding.offsets
        firsts = self._firsts(encoding, text, offsets)
        bounds = [offsets[first][0] for first in firsts]
        bounds[:1] = [0]
        return _Whole(text=text, ids=ids, is_next=is_next, bounds=bounds, firsts=firsts)

    def _firsts(self, encoding: Any, text: str, offsets: list[tuple[int, int]]) -> list[int]:  # noqa: ANN401
        """Return the index of the first token of each piece."""
        if self._rules.has_pieces:
            words: list[int] = encoding.word_ids
            last, firsts = -1, []
            for index, word in enumerate(words):
                if word != last:
                    firsts.append(index)
                    last = word
            return firsts
        pairs, firsts = self._rules.pairs, [0]
        for index in range(1, len(offsets)):
            start = offsets[index][0]
            # not between two bytes of one character
            is_between = offsets[index - 1][1] <= start and start > 0
            if is_between and text[start - 1 : start + 1] not in pairs:
                firsts.append(index)
        return firsts

    def _tails(self, whole: _Whole, spans: Sequence[tuple[int, int]]) -> list[_Tail]:
        """Return the tokens of parts of a text; those that are not known are tokenized at once."""
        keys = [(whole.is_next or start > 0, whole.text[start:end]) for start, end in spans]
        known = self._cache if len(self._cache) < _MAX_CACHED else {}
        fresh = {key: None for key in keys if key not in self._cache}
        made: dict[tuple[bool, str], _Tail] = {}
        for is_next in (False, True):
            texts = [text for flag, text in fresh if flag is is_next]
            encodings = self._encoder.backend(is_next=is_next).encode_batch(
                texts, add_special_tokens=False
            )
            for text, encoding in zip(texts, encodings, strict=True):
                made[is_next, text] = self._read_tail(text, encoding)
        tails = [made[key] if key in made else self._cache[key] for key in keys]
        known.update((key, tail) for key, tail in made.items() if len(key[1]) <= _MAX_CACHED_CHARS)
        return tails

    def _read_tail(self, text: str, encoding: Any) -> _Tail:  # noqa: ANN401
        offsets: list[tuple[int, int]] = encoding.offsets
        firsts = self._firsts(encoding, text, offsets)
        starts = [offsets[first][0] for first in firsts]
        starts[:1] = [0]
        piece = self._rules.first_unstable(text, starts)
        return _Tail(
            ids=tuple(encoding.ids),
            num_stable=firsts[piece],
            stable_end=starts[piece],
            is_sure=piece > 0 or not self._rules.has_pieces,
        )

    def _opened(self, text: str) -> dict[int, int]:
        """Return, for ends behind which an added token may be going on, where it begins."""
        parts, opened = self._rules.added_parts, dict[int, int]()
        for first in set(self._rules.added_starts).intersection(text):
            at = text.find(first)
            while at >= 0:
                end = at + 1
                while end <= len(text) and text[at:end] in parts:
                    opened[end] = min(at, opened.get(end, at))
                    end += 1
                at = text.find(first, at + 1)
        return opened


_EMPTY = Prefix(num_shared=0, others=(), num_stable=0, stable_end=0)


def _join(whole: _Whole, place: int, start: int, tail: _Tail, end: int) -> Prefix:
    """Return a beginning: the whole text's tokens before its tail, and the tail's."""
    before, ids = whole.firsts[place], tail.ids
    shared = 0
    if whole.ids[before : before + len(ids)] == list(ids):
        shared = len(ids)
    else:
        most = min(len(ids), len(whole.ids) - before)
        while shared < most and ids[shared] == whole.ids[before + shared]:
            shared += 1
    if tail.num_stable > shared:
        raise NotStableError(
            f"characters {start} to {end}: expected the same first {tail.num_stable} tokens "
            f"whatever follows, got {shared} of them in the whole text. Fix: use another base, as "
            "this tokenizer cannot be aligned"
        )
    return Prefix(
        num_shared=before + shared,
        others=ids[shared:],
        num_stable=before + tail.num_stable,
        stable_end=start + tail.stable_end,
    )


def shifted(prefix: Prefix, *, num_tokens: int, num_chars: int) -> Prefix:
    """Return the same beginning behind a text of other tokens and characters."""
    return replace(
        prefix,
        num_shared=prefix.num_shared + num_tokens,
        num_stable=prefix.num_stable + num_tokens,
        stable_end=prefix.stable_end + num_chars,
    )
