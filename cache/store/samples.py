"""Units and samples as they are read.

Letters: T tokens of a sample, R rows of a unit, n samples of a unit, D base width.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import widen
from carryon.cache.errors import DamagedStoreError
from carryon.cache.format.manifest import Manifest


def check_places(
    starts: NDArray[np.int64], lengths: NDArray[np.int32], manifest: Manifest, *, name: str
) -> None:
    """Check that samples lie one after another, each within a unit.

    Args:
        starts: [S] first row of each sample.
        lengths: [S] tokens of each sample.
        manifest: of the store, or of the part.
        name: of the store, for errors.

    Raises:
        DamagedStoreError: they do not.
    """
    if not len(starts):
        return
    size, stops = manifest.unit_tokens, starts + lengths
    is_ordered = starts[0] >= 0 and bool((stops[:-1] <= starts[1:]).all())
    is_inside = int(stops[-1]) <= manifest.num_units * size and not (lengths < 0).any()
    if not (is_ordered and is_inside and (starts % size + lengths <= size).all()):
        raise DamagedStoreError(
            f"{name}: samples/start, samples/length: expected samples one after another, each "
            "within a unit",
            fix="extract into another folder",
        )


Array = Any
"""A numpy array; after `as_torch`, a torch tensor on the same memory."""


class _Rows:
    """Arrays over the token axis."""

    __slots__ = ()
    hidden: dict[str, Array]

    def float32(self, tap: str) -> NDArray[np.float32]:
        """Return the states at a tap, [T, D] or [R, D], as float32; not after `as_torch`."""
        return widen(self.hidden[tap])

    def as_torch(self) -> Self:
        """Return the same with torch tensors on the same memory; bfloat16 states as such."""
        import torch

        tensors = {
            name: torch.from_numpy(getattr(self, name))
            for name in ("tokens", "loss_mask", "char_end")
        }
        hidden = {tap: torch.from_numpy(states) for tap, states in self.hidden.items()}
        for tap, states in hidden.items():
            if states.dtype == torch.uint16:
                hidden[tap] = states.view(torch.bfloat16)
        return replace(self, **tensors, hidden=hidden)  # type: ignore[type-var]  # a dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSample(_Rows):
    """Consecutive tokens of one sample."""

    index: int
    id: str
    tokens: Array
    """[T] int32 token ids."""
    loss_mask: Array
    """[T] uint8: 1 where the token is a training target."""
    char_end: Array
    """[T] int32: end of the token in the sample's text, in characters."""
    hidden: dict[str, Array]
    """[T, D] for each tap: uint16 bits of bfloat16, or float16, or float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit(_Rows):
    """One whole unit. The rows after its last sample belong to no sample."""

    unit: int
    samples: range
    """Indices of its samples."""
    starts: NDArray[np.int64]
    """[n] first row of each sample, counted within the unit."""
    lengths: NDArray[np.int32]
    """[n] tokens of each sample."""
    tokens: Array
    """[R] int32 token ids."""
    loss_mask: Array
    """[R] uint8: 1 where the token is a training target."""
    char_end: Array
    """[R] int32: end of the token in the sample's text, in characters."""
    hidden: dict[str, Array]
    """[R, D] for each tap: uint16 bits of bfloat16, or float16, or float32."""

    def rows_of(self, sample: int) -> slice:
        """Return the rows of a sample (index as in `samples`) within this unit."""
        position = sample - self.samples.start
        start = int(self.starts[position])
        return slice(start, start + int(self.lengths[position]))

    def sample(self, sample: int, *, sample_id: str) -> StoredSample:
        """Return a sample (index as in `samples`) as views of this unit's arrays."""
        rows = self.rows_of(sample)
        return StoredSample(
            index=sample,
            id=sample_id,
            tokens=self.tokens[rows],
            loss_mask=self.loss_mask[rows],
            char_end=self.char_end[rows],
            hidden={tap: states[rows] for tap, states in self.hidden.items()},
        )

    def shifted(self, *, units: int, samples: int) -> "Unit":
        """Return the same unit, its number and its samples' indices moved."""
        first = self.samples.start + samples
        numbers = range(first, first + len(self.samples))
        return replace(self, unit=self.unit + units, samples=numbers)
