"""A text that grows, with its tokens as if it ended here: a `Prefix` without the whole text.

A stable boundary stays one whatever follows, so each step looks at the text behind it alone.
"""

import codecs
from dataclasses import dataclass, replace

from carryon.cache.alignment.prefixes import PrefixTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class GrowingText:
    """A text as a base reads it so far."""

    tokens: tuple[int, ...]
    """Ids of the whole text."""
    num_stable: int
    """Tokens that no later text can change."""
    tail: str = ""
    """Text behind them."""
    partial: bytes = b""
    """Beginning of the next character."""
    is_next: bool = False
    """Whether text stands before the tail, or it continues another text."""

    @property
    def num_covered(self) -> int:
        """Bytes that are known behind the stable tokens."""
        return len(self.tail.encode()) + len(self.partial)


def begin_text(start: tuple[int, ...]) -> GrowingText:
    """Return an empty text behind the start tokens of a base."""
    return GrowingText(tokens=start, num_stable=len(start))


def end_prompt(text: GrowingText) -> GrowingText:
    """Return a text that no token reaches out of: generation begins here."""
    return replace(text, num_stable=len(text.tokens), tail="", is_next=True)


def grow(text: GrowingText, more: bytes, tokenizer: PrefixTokenizer) -> GrowingText:
    """Return a text with more bytes of UTF-8 behind it; wrong ones are read as U+FFFD. Pure.

    Args:
        text: so far.
        more: bytes, which may end within a character.
        tokenizer: of the base.
    """
    begun = text.partial + more
    known, num_read = codecs.utf_8_decode(begun, "replace", False)
    partial = begun[num_read:]
    if not known:
        return replace(text, partial=partial)
    tail = text.tail + known
    found = tokenizer.tail(tail, is_next=text.is_next)
    return GrowingText(
        tokens=text.tokens[: text.num_stable] + found.ids,
        num_stable=text.num_stable + found.num_stable,
        tail=tail[found.stable_end :],
        partial=partial,
        is_next=text.is_next or found.stable_end > 0,
    )
