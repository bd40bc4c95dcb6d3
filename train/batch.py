"""A batch: samples of one store side by side, padded on the right, with their supervised pairs.

A supervised pair is the state of one token and the id of the next, where that next token is a
training target of the same sample. Letters: B rows, T positions of the longest row, D base width,
M supervised pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.reader import Unit


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a step of training or evaluation needs of a few samples."""

    samples: NDArray[np.int64]
    """[B] indices of the samples in their store."""
    lengths: NDArray[np.int64]
    """[B] tokens of each sample; the rest of its row is pads."""
    states: dict[str, Tensor]
    """[B, T, D] for each tap, in the store's type; pads are 0."""
    tokens: Tensor
    """[B, T] int32; pads are 0."""
    positions: Tensor
    """[M] int64: b * T + t of each supervised pair's state, ascending."""
    targets: Tensor
    """[M] int64: the token that follows it."""

    @property
    def num_tokens(self) -> int:
        """Tokens without pads."""
        return int(self.lengths.sum())

    @property
    def num_targets(self) -> int:
        """M, supervised pairs."""
        return len(self.targets)

    def sample_of(self, pair: int) -> int:
        """Return the sample that supervised pair `pair` belongs to."""
        return int(self.samples[int(self.positions[pair]) // self.tokens.shape[1]])

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`; copies from pinned memory do not wait."""
        if device.type == "cpu":
            return self
        return Batch(
            samples=self.samples,
            lengths=self.lengths,
            states={tap: x.to(device, non_blocking=True) for tap, x in self.states.items()},
            tokens=self.tokens.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            targets=self.targets.to(device, non_blocking=True),
        )


def make_batch(
    samples: NDArray[np.int64], units: Mapping[int, Unit], *, taps: Sequence[str], is_pinned: bool
) -> Batch:
    """Copy `samples` out of the units that hold them.

    Args:
        samples: [B] sample indices, at least one.
        units: the units in memory, by number; each sample lies in one of them.
        taps: whose states are wanted.
        is_pinned: put the tensors where an accelerator can fetch them by itself.
    """
    places = [_place(sample, units) for sample in samples.tolist()]
    lengths = np.array([rows.stop - rows.start for _, rows in places], dtype=np.int64)
    shape = (len(places), int(lengths.max()))
    tokens = np.zeros(shape, dtype=np.int32)
    is_target = np.zeros(shape, dtype=bool)
    for row, (unit, rows) in enumerate(places):
        tokens[row, : lengths[row]] = unit.tokens[rows]
        is_target[row, 1 : lengths[row]] = unit.loss_mask[rows][1:] == 1
    # The pair of target (b, t) is the state at (b, t - 1): one less in flat order, as t >= 1.
    targets_at = np.flatnonzero(is_target)
    batch = Batch(
        samples=samples,
        lengths=lengths,
        states={tap: _stack(tap, places, shape=shape, lengths=lengths) for tap in taps},
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(targets_at - 1),
        targets=torch.from_numpy(tokens.reshape(-1)[targets_at].astype(np.int64)),
    )
    return _pinned(batch) if is_pinned else batch


def _place(sample: int, units: Mapping[int, Unit]) -> tuple[Unit, slice]:
    for unit in units.values():
        if sample in unit.samples:
            return unit, unit.rows_of(sample)
    raise AssertionError(f"sample {sample} lies in none of the units {sorted(units)}")


def _stack(
    tap: str,
    places: Sequence[tuple[Unit, slice]],
    *,
    shape: tuple[int, int],
    lengths: NDArray[np.int64],
) -> Tensor:
    first = places[0][0].hidden[tap]
    stacked: NDArray[Any] = np.zeros((*shape, first.shape[1]), dtype=first.dtype)
    for row, (unit, rows) in enumerate(places):
        stacked[row, : lengths[row]] = unit.hidden[tap][rows]
    states = torch.from_numpy(stacked)
    return states.view(torch.bfloat16) if states.dtype == torch.uint16 else states


def _pinned(batch: Batch) -> Batch:
    return Batch(
        samples=batch.samples,
        lengths=batch.lengths,
        states={tap: x.pin_memory() for tap, x in batch.states.items()},
        tokens=batch.tokens.pin_memory(),
        positions=batch.positions.pin_memory(),
        targets=batch.targets.pin_memory(),
    )
