"""The states of a source to heal a position from, by the tokens behind its last stable one."""

from collections.abc import Sequence

from carryon.cache.errors import InputError
from carryon.train.mixing.vocabulary_map import VocabularyMap

MOST_INSIDE = 3
"""Bytes of a character of UTF-8 that is not whole."""
Step = tuple[bool, bytes, int]
"""Whether it is the stable state, else the exact one; bytes covered from there; the next token."""


def count_inside(
    tokens: Sequence[int], *, num_covered: int, is_whole: bool, vocabulary_map: VocabularyMap
) -> int:
    """Return how many bytes are known of a character that is begun; the rest as `healing_steps`.

    Args:
        tokens: of the source behind its stable token.
        num_covered: bytes that are known behind it.
        is_whole: whether no character is begun.
        vocabulary_map: of source and anchor.
    """
    if is_whole:
        return 0
    # below 0: a blank that the tokenizer puts before any text
    return max(num_covered - sum(len(vocabulary_map.source[token] or b"") for token in tokens), 0)


def healing_steps(
    tokens: Sequence[int],
    inside: bytes,
    *,
    num_covered: int,
    has_stable: bool,
    vocabulary_map: VocabularyMap,
) -> list[Step]:
    """Return the states to heal a position from. Pure.

    Args:
        tokens: of the source behind its stable token, up to the exact one.
        inside: bytes behind the exact token, of a character that is begun.
        num_covered: bytes that are known behind the stable token.
        has_stable: whether there is a stable token.
        vocabulary_map: of source and anchor.
    """
    if not num_covered:
        return []
    spelled = b"".join(vocabulary_map.source[token] or b"" for token in tokens)
    steps: list[Step] = []
    text = (spelled + inside)[-num_covered:]
    if has_stable and tokens and len(text) == num_covered:
        steps.append((True, text, tokens[0]))
    if inside:
        try:
            steps.append((False, inside, vocabulary_map.first_token(inside)))
        except InputError:  # a vocabulary without these bytes
            return []
    return steps
