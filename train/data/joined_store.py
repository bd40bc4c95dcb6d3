"""An anchor's store with the states of other bases beside its own, row by row.

The other stores are aligned to the anchor's: row i of each belongs to row i of the anchor. Their
taps have the number of their store in front, such as `1:final`. Where a base has read nothing its
states are zeros. Letters: D base width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import Head
from carryon.cache.errors import InputError
from carryon.cache.store.reader import Store
from carryon.cache.store.samples import StoredSample, Unit
from carryon.cache.store.shard_reader import CopyRange
from carryon.cache.store.top_blocks import Blocks
from carryon.cache.store.view import StoreLike
from carryon.train.modules.taps import source_tap


class JoinedStore(StoreLike):
    """The anchor's samples, with more taps."""

    def __init__(self, anchor: StoreLike, sources: Sequence[tuple[Store, Sequence[str]]]) -> None:
        """Join stores; nothing is read.

        Args:
            anchor: whose samples they are.
            sources: stores that are aligned to it, each with the taps that are read.

        Raises:
            InputError: a store lacks a tap.
        """
        for name in StoreLike.__annotations__:
            setattr(self, name, getattr(anchor, name))
        self.finished_units = anchor.finished_units
        self._anchor = anchor
        self._places: dict[str, tuple[Store, str]] = {}
        for number, (store, taps) in enumerate(sources, 1):
            if missing := [tap for tap in taps if tap not in store.taps]:
                raise InputError(
                    f"mix_taps: {store.name}: expected the taps {', '.join(taps)}, got "
                    f"{', '.join(store.taps)}. Fix: --mix-taps of these, or carryon extract "
                    f"--align-to with --taps {' '.join(['final', *missing])}"
                )
            self._places |= {source_tap(number, tap): (store, tap) for tap in taps}
        self.taps = [*anchor.taps, *self._places]

    @property
    def source_widths(self) -> dict[str, int]:
        """Width of each tap of another base."""
        return {tap: store.width for tap, (store, _) in self._places.items()}

    def tap_width(self, tap: str) -> int:
        """Return the width of the states at a tap."""
        return self._places[tap][0].width if tap in self._places else self.width

    def tap_dtype(self, tap: str) -> np.dtype[Any]:
        """Return the array type of the states at a tap."""
        return self._places[tap][0].states_dtype if tap in self._places else self.states_dtype

    @property
    def sample_starts(self) -> NDArray[np.int64]:
        """[S] first row of each sample."""
        return self._anchor.sample_starts

    @property
    def sample_lengths(self) -> NDArray[np.int32]:
        """[S] tokens of each sample."""
        return self._anchor.sample_lengths

    @property
    def sample_held_out(self) -> NDArray[np.uint8]:
        """[S] 1 where the sample's corpus keeps it from training."""
        return self._anchor.sample_held_out

    @property
    def sample_groups(self) -> NDArray[np.uint64]:
        """[S] equal for samples of one record."""
        return self._anchor.sample_groups

    @property
    def sample_roles(self) -> NDArray[np.uint8]:
        """[S] 0, or 1 and 2 for the answers of a preference pair."""
        return self._anchor.sample_roles

    def sample_id(self, sample: int) -> str:
        """Return the id of a sample."""
        return self._anchor.sample_id(sample)

    def index_of(self, sample_id: str) -> int:
        """Return the index of the sample with this id."""
        return self._anchor.index_of(sample_id)

    def read_unit(self, unit: int, *, taps: Sequence[str] | None = None) -> Unit:
        """Read one whole unit."""
        own, others = self._split(taps)
        read = self._anchor.read_unit(unit, taps=own)
        hidden = {
            tap: store.read_unit(unit, taps=[inner]).hidden[inner]
            for tap, (store, inner) in others.items()
        }
        return replace(read, hidden={**read.hidden, **hidden})

    def read_sample(
        self,
        sample: int | str,
        *,
        taps: Sequence[str] | None = None,
        **rows: Any,  # noqa: ANN401
    ) -> StoredSample:
        """Read tokens of one sample, with the options of `StoreLike.read_sample`."""
        own, others = self._split(taps)
        read = self._anchor.read_sample(sample, taps=own, **rows)
        hidden = {
            tap: store.read_sample(read.index, taps=[inner], **rows).hidden[inner]
            for tap, (store, inner) in others.items()
        }
        return replace(read, hidden={**read.hidden, **hidden})

    def copy_states(self, unit: int, tap: str, moves: Sequence[CopyRange]) -> None:
        """Decode rows of a unit's states at a tap straight to where they are wanted."""
        store, inner = self._places.get(tap, (self._anchor, tap))
        store.copy_states(unit, inner, moves)

    def head(self, *, is_mapped: bool = False) -> Head:
        """Return the anchor's frozen head and final norm."""
        return self._anchor.head(is_mapped=is_mapped)

    def blocks(self) -> Blocks:
        """Return the anchor's last blocks."""
        return self._anchor.blocks()

    def _split(self, taps: Sequence[str] | None) -> tuple[list[str], dict[str, tuple[Store, str]]]:
        """Return taps of the anchor, and of the other stores."""
        wanted = self.taps if taps is None else taps
        others = {tap: self._places[tap] for tap in wanted if tap in self._places}
        return [tap for tap in wanted if tap not in others], others
