"""States of a source at rows of the anchor's store, from the store that is aligned to it.

At each row the source's tokens are those of exactly the text that is known there. Behind the last
stable token they may end inside a word, so the stable state is given to heal from. Where the row
ends inside a character, its exact state is that of the whole characters before it; the rest of the
character's bytes is covered from there. Letters: n rows that are asked for, D_B source width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.format.alignment import UnitAlignment, read_alignment
from carryon.cache.store.reader import Store
from carryon.cache.store.samples import Unit
from carryon.train.mixing.healing import (
    MOST_INSIDE,
    HealingStates,
    Step,
    count_inside,
    healing_steps,
)
from carryon.train.mixing.vocabulary_map import VocabularyMap

EXACT, STABLE = "final", "stable"
"""Taps of an aligned store."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SourceStates:
    """What the source has at some rows."""

    is_known: NDArray[np.bool_]
    """[n] whether the source has read anything there, or the sample at all."""
    exact: Tensor
    """[known, D_B] states at the rows that are known, in the store's type."""
    healing: HealingStates
    """States before them; `rows` count the known ones."""
    num_unhealed: int
    """Rows that end inside text of the source behind no stable token, or of other bytes."""


class AlignedStates:
    """An aligned store, read a unit at a time."""

    def __init__(self, store: Store, vocabulary_map: VocabularyMap) -> None:
        """Read nothing yet.

        Args:
            store: aligned to the anchor's.
            vocabulary_map: of its base and the anchor.
        """
        self.store = store
        self._map = vocabulary_map
        self._read = lru_cache(1)(self._read_unit)

    def at(self, rows: NDArray[np.int64]) -> SourceStates:
        """Return the states at rows of one unit.

        Args:
            rows: [n] of the store, ascending, all of one unit.

        Raises:
            DamagedStoreError: the unit is not as it was written.
        """
        number = int(rows[0]) // self.store.unit_tokens
        unit, aligned = self._read(number)
        local = rows - number * self.store.unit_tokens
        is_known = aligned.exact[local] >= 0
        known = local[is_known]
        at, healed, is_stable, covered, following = [], [], [], [], []
        num_unhealed = 0
        for place, row in enumerate(known.tolist()):
            steps = self._steps(unit, aligned, row)
            num_unhealed += aligned.covered[row] > 0 and not steps
            for of_stable, text, token in steps:
                at.append(place)
                healed.append(row)
                is_stable.append(of_stable)
                covered.append(text)
                following.append(token)
        exact = _tensor(unit.hidden[EXACT][known])
        from_rows = np.array(healed, dtype=np.int64)
        chosen = np.array(is_stable, dtype=np.bool_)[:, None]
        before = np.where(chosen, unit.hidden[STABLE][from_rows], unit.hidden[EXACT][from_rows])
        healing = HealingStates(
            rows=torch.tensor(at, dtype=torch.int64),
            states=_tensor(before),
            covered=covered,
            next_tokens=torch.tensor(following, dtype=torch.int64),
            anchor_tokens=torch.from_numpy(unit.tokens[from_rows].astype(np.int64)),
        )
        return SourceStates(
            is_known=is_known, exact=exact, healing=healing, num_unhealed=int(num_unhealed)
        )

    def _read_unit(self, number: int) -> tuple[Unit, UnitAlignment]:
        store = self.store
        unit = store.read_unit(number, taps=[EXACT, STABLE])
        return unit, read_alignment(store.root, store.manifest, number)

    def _steps(self, unit: Unit, aligned: UnitAlignment, row: int) -> list[Step]:
        """Return the states to heal a row from: whether stable, bytes covered, next token."""
        num_covered = int(aligned.covered[row])
        if not num_covered:
            return []
        tokens, node, stable = [], int(aligned.exact[row]), int(aligned.stable[row])
        while node not in (stable, -1):
            tokens.append(int(aligned.tokens[node]))
            node = int(aligned.parents[node])
        tokens.reverse()
        num_inside = count_inside(
            tokens,
            num_covered=num_covered,
            is_whole=bool(aligned.is_whole[row]),
            vocabulary_map=self._map,
        )
        if num_inside > MOST_INSIDE:  # no text gives that; a store of a stranger may
            return []
        inside = _last_bytes(unit, row, num_inside, self._map.anchor)
        return healing_steps(
            tokens,
            inside if len(inside) == num_inside else b"",
            num_covered=num_covered,
            has_stable=stable >= 0,
            vocabulary_map=self._map,
        )


def _last_bytes(unit: Unit, row: int, count: int, tokens: Sequence[bytes | None]) -> bytes:
    """Return the last bytes that the anchor's tokens up to a row spell."""
    text = b""
    while len(text) < count and row >= 0:
        text = (tokens[int(unit.tokens[row])] or b"") + text
        row -= 1
    return text[-count:] if count else b""


def _tensor(states: NDArray[np.generic]) -> Tensor:
    tensor = torch.from_numpy(states)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
