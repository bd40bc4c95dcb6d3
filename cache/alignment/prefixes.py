"""Tokens of every beginning of a text, each as if nothing followed.

The tokens of a beginning are those of the whole text up to a stable boundary, and from there the
tokens of its last few words, which are looked up in a cache. Only where the two differ from the
whole text do new tokens come in. Letters: T tokens of a text, E beginnings.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from carryon.cache.alignment.boundaries import SPACE, BoundaryRules
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
    """A text's tokens and those of its beginnings; fields of all as arrays, see Prefix."""

    tokens: NDArray[np.int32]
    """[T] of the whole text."""
    ends: NDArray[np.int64]
    """[E] characters of each beginning, ascending."""
    num_shared: NDArray[np.int64]
    """[E]."""
    others: dict[int, tuple[int, ...]]
    """Of the beginnings that have some, by their index."""
    num_stable: NDArray[np.int64]
    """[E]."""
    stable_end: NDArray[np.int64]
    """[E]."""

    def at(self, end: int) -> Prefix:
        """Return the tokens of the beginning of `end` characters."""
        index = int(np.searchsorted(self.ends, end))
        return Prefix(
            num_shared=int(self.num_shared[index]),
            others=self.others.get(index, ()),
            num_stable=int(self.num_stable[index]),
            stable_end=int(self.stable_end[index]),
        )

    def part(self, count: int) -> "Prefixes":
        """Return the first beginnings."""
        return Prefixes(
            tokens=self.tokens,
            ends=self.ends[:count],
            num_shared=self.num_shared[:count],
            others={index: ids for index, ids in self.others.items() if index < count},
            num_stable=self.num_stable[:count],
            stable_end=self.stable_end[:count],
        )

    def shifted(self, *, num_tokens: int, num_chars: int) -> "Prefixes":
        """Return the same beginnings behind a text of other tokens and characters."""
        return replace(
            self,
            ends=self.ends + num_chars,
            num_shared=self.num_shared + num_tokens,
            num_stable=self.num_stable + num_tokens,
            stable_end=self.stable_end + num_chars,
        )


def join(parts: Sequence[Prefixes]) -> Prefixes:
    """Return the beginnings of all parts of a text, each already shifted to its place."""
    others: dict[int, tuple[int, ...]] = {}
    num_before = 0
    for part in parts:
        others |= {num_before + index: ids for index, ids in part.others.items()}
        num_before += len(part.ends)
    return Prefixes(
        tokens=np.concatenate([part.tokens for part in parts]),
        ends=np.concatenate([part.ends for part in parts]),
        num_shared=np.concatenate([part.num_shared for part in parts]),
        others=others,
        num_stable=np.concatenate([part.num_stable for part in parts]),
        stable_end=np.concatenate([part.stable_end for part in parts]),
    )


class Tail(NamedTuple):
    """Tokens of the last words of a beginning; a tuple, as there are millions."""

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
    ids: NDArray[np.int32]
    """[T]."""
    is_next: bool
    bounds: NDArray[np.int64]
    """Characters where a piece begins, ascending from 0."""
    firsts: NDArray[np.int64]
    """Index of the first token of each piece."""


class PrefixTokenizer:
    """Tokenizes beginnings of texts; keeps the tokens of tails."""

    def __init__(self, encoder: Encoder, rules: BoundaryRules) -> None:
        """Start with an empty cache."""
        self._encoder, self._rules = encoder, rules
        self._caches: tuple[dict[str, Tail], dict[str, Tail]] = ({}, {})

    def tokenize(self, text: str, ends: Iterable[int], *, is_next: bool) -> Prefixes:
        """Return the tokens of a text and of its beginnings.

        Args:
            text: that no token reaches out of.
            ends: characters of the beginnings, more than 0.
            is_next: whether it continues another text.

        Raises:
            NotStableError: a token taken for stable is not one of the whole text.
        """
        whole = self._read_whole(text, is_next=is_next)
        wanted = np.array(sorted(set(ends)), dtype=np.int64)
        shared, stable, stable_end = (np.zeros(len(wanted), dtype=np.int64) for _ in range(3))
        found = Prefixes(
            tokens=whole.ids,
            ends=wanted,
            num_shared=shared,
            others={},
            num_stable=stable,
            stable_end=stable_end,
        )
        pieces = np.searchsorted(whole.bounds, wanted)
        places, is_word = self._first_places(whole, wanted, pieces)
        waiting = np.arange(len(wanted))
        while len(waiting):
            starts = whole.bounds[places[waiting]]
            tails = self._tails(whole, starts.tolist(), wanted[waiting].tolist())
            is_done = np.fromiter((tail.is_sure for tail in tails), np.bool_, count=len(tails))
            is_done |= (places[waiting] == 0) | is_word[waiting]
            _join_(found, whole, waiting, places[waiting], tails, is_done)
            waiting = waiting[~is_done]
            places[waiting] = np.maximum(2 * places[waiting] - pieces[waiting], 0)
        return found

    def _first_places(
        self, whole: _Whole, wanted: NDArray[np.int64], pieces: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the piece at which the tail of each beginning starts, [E], and if it is sure."""
        steps = 1 if self._rules.has_pieces else 0
        places: NDArray[np.int64] = np.maximum(pieces - 1 - steps, 0)
        is_word = np.zeros(len(wanted), dtype=np.bool_)
        if self._rules.has_pieces:
            is_word = _end_in_words(whole.text, whole.bounds[pieces - 1], wanted)
            places[is_word] = pieces[is_word] - 1
        opened = self._opened(whole.text) if self._rules.added_starts else {}
        for end, begun in opened.items():
            index = int(np.searchsorted(wanted, end))
            if index == len(wanted) or wanted[index] != end:
                continue
            before = int(np.searchsorted(whole.bounds, begun)) - 1
            places[index] = max(min(int(pieces[index]) - 1 - steps, before) - steps, 0)
            is_word[index] = False
        return places, is_word

    def tail(self, text: str, *, is_next: bool) -> Tail:
        """Return the tokens of a text, not empty, that begins where a piece does.

        Args:
            text: the last words of a beginning.
            is_next: whether anything stands before it.
        """
        return self._look_up([text], is_next=is_next)[0]

    def _read_whole(self, text: str, *, is_next: bool) -> _Whole:
        encoding = self._encoder.backend(is_next=is_next).encode(text, add_special_tokens=False)
        firsts, starts = self._pieces(encoding, text)
        return _Whole(
            text=text,
            ids=np.array(encoding.ids, dtype=np.int32),
            is_next=is_next,
            bounds=np.array(starts, dtype=np.int64),
            firsts=np.array(firsts, dtype=np.int64),
        )

    def _pieces(self, encoding: Any, text: str) -> tuple[list[int], list[int]]:  # noqa: ANN401
        """Return the index of the first token of each piece, and the character it begins at."""
        offsets: list[tuple[int, int]] = encoding.offsets
        if not offsets:  # a text of which the vocabulary has no byte
            return [0], [0]
        firsts = self._firsts(encoding, text, offsets)
        return firsts, [0, *(offsets[first][0] for first in firsts[1:])]

    def _firsts(self, encoding: Any, text: str, offsets: list[tuple[int, int]]) -> list[int]:  # noqa: ANN401
        """Return the index of the first token of each piece of a text with tokens."""
        if self._rules.has_pieces:
            words: list[int] = encoding.word_ids
            last, firsts = -1, []
            for index, word in enumerate(words):
                if word != last:
                    firsts.append(index)
                    last = word
            return firsts
        pairs, firsts = self._rules.pairs, [0]
        text = text.replace(SPACE, " ")  # which has the token of a blank
        for index in range(1, len(offsets)):
            start = offsets[index][0]
            # not between two bytes of one character
            is_between = offsets[index - 1][1] <= start and start > 0
            if is_between and text[start - 1 : start + 1] not in pairs:
                firsts.append(index)
        return firsts

    def _tails(self, whole: _Whole, starts: list[int], ends: list[int]) -> list[Tail]:
        """Return the tokens of parts of a text."""
        parts = [whole.text[start:end] for start, end in zip(starts, ends, strict=True)]
        tails = self._look_up(parts, is_next=True)
        if self._encoder.has_prefix and not whole.is_next:
            at_start = [index for index, start in enumerate(starts) if not start]
            others = self._look_up([parts[index] for index in at_start], is_next=False)
            for index, tail in zip(at_start, others, strict=True):
                tails[index] = tail
        return tails

    def _look_up(self, parts: Sequence[str], *, is_next: bool) -> list[Tail]:
        """Return the tokens of texts; those that are not known are tokenized at once."""
        cache = self._caches[is_next]
        fresh = [part for part in dict.fromkeys(parts) if part not in cache]
        encodings = self._encoder.backend(is_next=is_next).encode_batch(
            fresh, add_special_tokens=False
        )
        made = {
            part: self._read_tail(part, encoding)
            for part, encoding in zip(fresh, encodings, strict=True)
        }
        tails = [made[part] if part in made else cache[part] for part in parts]
        if len(cache) < _MAX_CACHED:
            short = (part for part in fresh if len(part) <= _MAX_CACHED_CHARS)
            cache.update((part, made[part]) for part in short)
        return tails

    def _read_tail(self, text: str, encoding: Any) -> Tail:  # noqa: ANN401
        firsts, starts = self._pieces(encoding, text)
        piece = self._rules.first_unstable(text, starts)
        return Tail(
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


def _end_in_words(
    text: str, starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Tell which beginnings end within a piece of ASCII letters behind a blank or other ASCII.

    Such a piece begins there whatever follows. No regular expression of a byte-level tokenizer
    looks further than to the first character that is no white space, or behind a run of digits,
    and both are part of the beginning. So its tokens depend on nothing before it, and are found in
    the cache more often. Left out are letters behind an apostrophe, which may be a contraction, and
    those behind another letter: where a capital begins a piece (XML, Http), the next letter decides
    which one does.

    Args:
        text: the whole text.
        starts: [E] where the piece begins in which a beginning ends.
        ends: [E] of the beginnings, more than `starts`.
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    lower = points | 0x20
    is_letter = (lower >= ord("a")) & (lower <= ord("z"))
    before = np.concatenate([[0], np.cumsum(is_letter)])
    is_blank = points[starts] == ord(" ")
    firsts = starts + is_blank
    is_plain = (firsts < ends) & (before[ends] - before[firsts] == ends - firsts)
    last = np.maximum(starts - 1, 0)
    is_apart = (points[last] < 0x80) & (points[last] != ord("'")) & ~is_letter[last]
    is_word: NDArray[np.bool_] = is_plain & (is_blank | is_apart | (starts == 0))
    return is_word


def _join_(
    found: Prefixes,
    whole: _Whole,
    indices: NDArray[np.int64],
    places: NDArray[np.int64],
    tails: Sequence[Tail],
    is_done: NDArray[np.bool_],
) -> None:
    """Fill in the beginnings that are the whole text's tokens before a tail, and the tail's.

    Args:
        found: of the text.
        whole: the text.
        indices: of the beginnings.
        places: piece at which each tail starts.
        tails: of each.
        is_done: which are filled in.
    """
    chosen = [tail for tail, done in zip(tails, is_done.tolist(), strict=True) if done]
    if not chosen:
        return
    indices, places = indices[is_done], places[is_done]
    ids, num_stable, stable_end, _ = zip(*chosen, strict=True)
    before = whole.firsts[places]
    shared = _count_shared(whole.ids, before, ids)
    stable = np.array(num_stable, dtype=np.int64)
    if bool((stable > shared).any()):
        worst = int(np.argmax(stable > shared))
        raise NotStableError(
            f"the tokens from character {whole.bounds[places[worst]]}: expected the same first "
            f"{stable[worst]} tokens whatever follows, got {shared[worst]} of them in the "
            "whole text. Fix: use another base, as this tokenizer cannot be aligned"
        )
    found.num_shared[indices] = before + shared
    found.num_stable[indices] = before + stable
    found.stable_end[indices] = whole.bounds[places] + np.array(stable_end, dtype=np.int64)
    lengths = np.fromiter(map(len, ids), np.int64, count=len(ids))
    for number in np.flatnonzero(shared < lengths).tolist():
        found.others[int(indices[number])] = ids[number][int(shared[number]) :]


def _count_shared(
    whole: NDArray[np.int32], before: NDArray[np.int64], ids: Sequence[tuple[int, ...]]
) -> NDArray[np.int64]:
    """Return how many tokens of each tail are those of the whole text at its place, [tails].

    Args:
        whole: [T].
        before: [tails] tokens of the whole text before each tail.
        ids: of each tail.
    """
    lengths = np.fromiter(map(len, ids), np.int64, count=len(ids))
    flat = np.fromiter(chain.from_iterable(ids), np.int32, count=int(lengths.sum()))
    number = np.repeat(np.arange(len(ids)), lengths)
    offset = np.arange(len(flat)) - (np.cumsum(lengths) - lengths)[number]
    at = before[number] + offset
    is_other = at >= len(whole)
    is_other[~is_other] = whole[at[~is_other]] != flat[~is_other]
    others = np.flatnonzero(is_other)
    differing, firsts = np.unique(number[others], return_index=True)
    shared = lengths
    shared[differing] = offset[others[firsts]]
    return shared
