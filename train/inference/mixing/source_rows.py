"""A source in one generation: the text of each row, the tokens that it has run, and their states.

Letters: B rows, n rows that are asked for, D source width.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carryon.cache.alignment.growing_text import GrowingText, grow
from carryon.cache.errors import InputError
from carryon.train.inference.mixing.source_base import SourceBase
from carryon.train.inference.mixing.source_cache import SourceCache
from carryon.train.mixing.healing import HealingStates, count_inside, healing_steps


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RowStates:
    """What a source has at the end of some rows."""

    known: list[int]
    """Which of the n rows it has read anything of."""
    exact: Tensor
    """[known, D]."""
    healing: HealingStates
    """States before them; `rows` count the known ones."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Run:
    """What a row has run."""

    tokens: tuple[int, ...] = ()
    num_stable: int = 0
    """Tokens that no later text changes."""
    states: Tensor
    """[k, D] of the last tokens, from the stable one on."""


class SourceRows:
    """The rows of a batch, as a source reads them."""

    def __init__(self, source: SourceBase, texts: Sequence[GrowingText]) -> None:
        """Begin with a text for each row; nothing is run."""
        self.source = source
        self._texts = list(texts)
        base = source.base
        self._cache = SourceCache(base, num_rows=len(texts))
        empty = torch.zeros(0, base.identity.width, device=base.device, dtype=base.compute_dtype)
        self._runs = [_Run(states=empty)] * len(texts)

    def add(self, row: int, more: bytes) -> None:
        """Add bytes to the text of a row."""
        self._texts[row] = grow(self._texts[row], more, self.source.tokenizer)

    def select(self, rows: Sequence[int]) -> None:
        """Keep some rows, in this order; one may be there several times."""
        self._texts = [self._texts[row] for row in rows]
        self._runs = [self._runs[row] for row in rows]
        self._cache.select(rows)

    def read(self, rows: Sequence[int], anchor_tokens: Sequence[int]) -> RowStates:
        """Run what the rows have new, and return the states at their ends.

        Args:
            rows: n of the batch, ascending.
            anchor_tokens: [n] the anchor's token that ends at each.

        Raises:
            InputError: a text is longer than the context of the source.
        """
        self._advance(rows)
        known = [place for place, row in enumerate(rows) if self._texts[row].tokens]
        at, states, covered, following, tokens = [], [], [], [], []
        for number, place in enumerate(known):
            text, run = self._texts[rows[place]], self._runs[rows[place]]
            behind = text.tokens[text.num_stable :]
            num_covered, mapped = text.num_covered, self.source.vocabulary_map
            num_inside = count_inside(
                behind,
                num_covered=num_covered,
                is_whole=not text.partial,
                vocabulary_map=mapped,
            )
            for of_stable, spelled, token in healing_steps(
                behind,
                text.partial[len(text.partial) - num_inside :] if num_inside else b"",
                num_covered=num_covered,
                has_stable=text.num_stable > 0,
                vocabulary_map=mapped,
            ):
                at.append(number)
                states.append(run.states[0] if of_stable else run.states[-1])
                covered.append(spelled)
                following.append(token)
                tokens.append(anchor_tokens[place])
        ends = [self._runs[rows[place]].states[-1] for place in known]
        empty = torch.zeros(0, self.source.base.identity.width)
        return RowStates(
            known=known,
            exact=torch.stack(ends) if ends else empty,
            healing=HealingStates(
                rows=torch.tensor(at, dtype=torch.int64),
                states=torch.stack(states) if states else empty,
                covered=covered,
                next_tokens=torch.tensor(following, dtype=torch.int64),
                anchor_tokens=torch.tensor(tokens, dtype=torch.int64),
            ),
        )

    def _advance(self, rows: Sequence[int]) -> None:
        """Crop the rows to the tokens that stay, and run those behind them."""
        num_kept = [len(run.tokens) for run in self._runs]
        new: list[tuple[int, ...]] = [()] * len(num_kept)
        again, most = 0, self.source.base.identity.context_tokens
        for row in rows:
            run, text = self._runs[row], self._texts[row]
            if len(text.tokens) > most:
                raise InputError(
                    f"mix: {self.source.name}: expected at most the {most} tokens that this base "
                    f"allows, got {len(text.tokens)}. Fix: a shorter prompt, or fewer new tokens"
                )
            num_kept[row] = _num_common(run.tokens, text.tokens, since=run.num_stable)
            new[row] = text.tokens[num_kept[row] :]
            again += min(len(run.tokens) - num_kept[row], len(new[row]))
        lengths = [len(run.tokens) for run in self._runs]
        if not any(new) and num_kept == lengths:
            return
        started = time.perf_counter()
        found = self._cache.run(num_kept, new)
        cost = self.source.cost
        cost.seconds += time.perf_counter() - started
        cost.tokens += sum(map(len, new))
        cost.tokens_again += again
        for row in rows:
            run, text = self._runs[row], self._texts[row]
            first = max(run.num_stable - 1, 0)  # token of the first state that is kept
            states = torch.cat([run.states[: num_kept[row] - first], found[row]])
            self._runs[row] = _Run(
                tokens=text.tokens,
                num_stable=text.num_stable,
                states=states[max(text.num_stable - 1, 0) - first :],
            )


def _num_common(first: Sequence[int], second: Sequence[int], *, since: int) -> int:
    """Return how many tokens both begin with; the first `since` are equal."""
    stop = min(len(first), len(second))
    at = since
    while at < stop and first[at] == second[at]:
        at += 1
    return at
