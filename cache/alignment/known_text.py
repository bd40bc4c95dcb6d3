"""What an anchor knows at the end of each of its tokens, and how much of another text that is.

Letters: T tokens of the anchor.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.alignment.boundaries import SPACE, steps_of
from carryon.cache.corpus.tokenize import Encoder
from carryon.cache.errors import InputError

Span = tuple[int, int]
_START_CHARS = 256


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Known:
    """Characters that are known at the end of each token, and bytes of the next one."""

    ends: NDArray[np.int64]
    """[T]."""
    partial: NDArray[np.int32]
    """[T]."""


def find_known(
    tokens: NDArray[np.int32],
    char_end: NDArray[np.int32],
    pieces: dict[int, bytes],
    *,
    start: int = 0,
) -> Known:
    """Return what is known at the end of each token of a sample.

    Args:
        tokens: [T].
        char_end: [T] end of each, or of the character that it is in.
        pieces: bytes of each token that is not whole characters; see `broken_tokens`.
        start: character at which the sample begins.
    """
    ends = char_end.astype(np.int64)
    partial = np.zeros(len(tokens), dtype=np.int32)
    begun = b""
    last = -2
    is_broken = np.isin(tokens, np.fromiter(pieces, dtype=np.int32, count=len(pieces)))
    for index in np.flatnonzero(is_broken).tolist():
        if index != last + 1:
            begun = b""
        begun, last = _rest(begun + pieces[int(tokens[index])]), index
        if begun:
            ends[index] -= 1
            partial[index] = len(begun)
    return Known(ends=np.maximum(ends, start), partial=partial)


def broken_tokens(encoder: Encoder) -> dict[int, bytes]:
    """Return the bytes of the tokens that begin or end within a character."""
    rules: dict[str, Any] = json.loads(encoder.backend(is_next=False).to_str())
    vocabulary: dict[str, int] = rules["model"]["vocab"]
    values = {name: byte for byte, name in byte_names(rules).items()}
    if not values:
        names = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(0x80, 0x100)}
        return {vocabulary[name]: value for name, value in names.items() if name in vocabulary}
    broken = {}
    for name, token in vocabulary.items():
        if name.isascii() or not all(char in values for char in name):
            continue
        piece = bytes(values[char] for char in name)
        try:
            piece.decode()
        except UnicodeDecodeError:
            broken[token] = piece
    return broken


def begins_with(start: NDArray[np.int32], text: str, encoder: Encoder) -> bool:
    """Tell whether a text itself begins with the tokens that are put before any text."""
    ids = encoder.encode(text[:_START_CHARS]).ids[: len(start)]
    return len(start) > 0 and bool(np.array_equal(ids, start))


def begins_with_prefix(text: str, encoder: Encoder) -> bool:
    """Tell whether the first token is a blank alone, of a tokenizer that puts one before any text.

    Its place is that of the first character, which it tells nothing of: not even whether that is a
    blank itself, before which some put none.
    """
    if not encoder.has_prefix:
        return False
    return encoder.name_of(encoder.encode(text[:_START_CHARS]).ids[:1].tolist()) == [SPACE]


def map_known(
    known: Known, own: Sequence[Span], other: Sequence[Span], cuts: Sequence[Span] = ()
) -> Known:
    """Return how much of another rendering is known: all of it that says the same, and no more.

    Within a content it is the same part of the content. Behind a content, up to the beginning of
    the next one, it is the content's end: what a template writes next may depend on what follows,
    a call of a tool where a text might have come. Where generation begins it is all before it.

    Args:
        known: at each token of the anchor.
        own: (start, stop) of each content in the anchor's text, ascending, none empty.
        other: the same contents in the other text.
        cuts: where generation begins in the anchor's text and in the other, ascending.
    """
    starts, stops = (np.array([0, *each]) for each in zip(*own, strict=True))
    firsts, lasts = (np.array([0, *each]) for each in zip(*other, strict=True))
    is_begun = known.partial > 0  # the first character of a content, perhaps
    number = np.searchsorted(starts[1:], known.ends + is_begun)  # 0: before the first
    ends = firsts[number] + np.minimum(known.ends, stops[number]) - starts[number]
    is_inside = (number > 0) & (known.ends < stops[number])
    ends = np.where(is_inside, ends, lasts[number])
    own_cuts, other_cuts = (np.array([0, *(cut[side] for cut in cuts)]) for side in (0, 1))
    turn = np.searchsorted(own_cuts[1:], known.ends, side="right")
    ends = np.where(own_cuts[turn] > starts[number], other_cuts[turn], ends)
    return Known(ends=ends, partial=np.where(is_inside, known.partial, 0).astype(np.int32))


def refuse_other_contents(
    own_text: str, own: Sequence[Span], other_text: str, other: Sequence[Span], *, sample: str
) -> None:
    """Check that both renderings say the same.

    Raises:
        InputError: names the sample and the first content that differs.
    """
    for number, ((start, stop), (first, last)) in enumerate(zip(own, other, strict=True)):
        if own_text[start:stop] != other_text[first:last]:
            raise InputError(
                f"sample {sample!r}: content {number}: expected the same text under both chat "
                f"templates, got {own_text[start:stop]!a:.60} and {other_text[first:last]!a:.60}. "
                "Fix: --chat-template FILE"
            )


def _rest(piece: bytes) -> bytes:
    """Return the beginning of a character at the end of bytes."""
    for size in (1, 2, 3):
        if len(piece) < size:
            break
        byte = piece[-size]
        if byte & 0xC0 != 0x80:  # not a later byte of a character
            needed = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return piece[-size:] if needed > size else b""
    return b""


def byte_names(rules: dict[str, Any]) -> dict[int, str]:
    """Return the character that stands for each byte (GPT-2's table); empty: not byte-level.

    Args:
        rules: of a tokenizer.
    """
    steps = steps_of(rules.get("pre_tokenizer"), "pretokenizers")
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return {}
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    names = {byte: chr(byte) for byte in plain}
    return names | {byte: chr(256 + index) for index, byte in enumerate(others)}
