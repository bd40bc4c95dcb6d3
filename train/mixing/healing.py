"""The states of a source to heal a position from, by the tokens behind its last stable one.

Letters: n positions, m healing states, D_B width of the source.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.train.mixing.vocabulary_map import VocabularyMap

MOST_INSIDE = 3
"""Bytes of a character of UTF-8 that is not whole."""
Step = tuple[bool, bytes, int]
"""Whether it is the stable state, else the exact one; bytes covered from there; the next token."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class HealingStates:
    """States of the source before the end of what the anchor has written."""

    rows: Tensor
    """[m] int64 on the host, never decreasing: position of each; those of one are s_0, s_1 ..."""
    states: Tensor
    """[m, D_B] states s_k of the tap `final`."""
    covered: Sequence[bytes]
    """[m] c_k, not empty."""
    next_tokens: Tensor
    """[m] int64 on the host: the source's token t_(k+1)."""
    anchor_tokens: Tensor
    """[m] int64 on the host: the anchor's token that ends at the position, which contradicts some
    tokens that cross it; -1: none is looked at."""

    def between(self, start: int, stop: int) -> "HealingStates":
        """Return those of the positions from `start` to `stop`, counted from `start`."""
        bounds = torch.searchsorted(self.rows, torch.tensor([start, stop]))
        first, last = int(bounds[0]), int(bounds[1])
        return HealingStates(
            rows=self.rows[first:last] - start,
            states=self.states[first:last],
            covered=self.covered[first:last],
            next_tokens=self.next_tokens[first:last],
            anchor_tokens=self.anchor_tokens[first:last],
        )


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


def heal_from_stable(
    stable_states: Tensor,
    covered: Sequence[bytes],
    anchor_tokens: Tensor,
    vocabulary_map: VocabularyMap,
) -> HealingStates:
    """Return one healing state for each position with covered bytes: the stable one.

    t_1 is taken to be the longest token that begins the covered bytes.

    Args:
        stable_states: [n, D_B] states at the last token that no later byte can change.
        covered: [n] bytes behind it, empty where it ends with the position.
        anchor_tokens: [n] the anchor's token that ends at each position; -1: not known.
        vocabulary_map: of source and anchor.
    """
    rows = [row for row, each in enumerate(covered) if each]
    firsts = [vocabulary_map.first_token(covered[row]) for row in rows]
    at = torch.tensor(rows, dtype=torch.int64)
    return HealingStates(
        rows=at,
        states=stable_states[at.to(stable_states.device)],
        covered=[covered[row] for row in rows],
        next_tokens=torch.tensor(firsts, dtype=torch.int64),
        anchor_tokens=anchor_tokens.cpu()[at].to(torch.int64),
    )
