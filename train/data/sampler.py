"""The order of an epoch: a pure function of sample lengths, units, seeds and epoch.

Units are read in a seeded random order, a few at a time: a window. Within a window the samples are
shuffled and cut into steps of so many tokens. Which units make a window depends on one seed, their
samples' order on another, so that runs of several seeds and batch sizes can share one read of the
store (joint_order.py). Batches are flat (batch.py), so neighbours need not be of one length:
grouping by length would also group by kind. Nothing depends on how many processes share the work:
each takes samples of every batch (`rank_rows`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_SHUFFLE = 1
"""Keeps the numbers drawn for the order within windows apart from those for the units'."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Units that are in memory together, and the steps made of their samples."""

    units: tuple[int, ...]
    """Units to read."""
    steps: tuple[tuple[NDArray[np.int64], ...], ...]
    """Steps; each is one or more batches of sample indices, computed one after another."""


def plan_epoch(
    samples: NDArray[np.int64],
    *,
    lengths: NDArray[np.int32],
    units: NDArray[np.int64],
    seed: Sequence[int],
    epoch: int,
    tokens_per_step: int,
    micro_batch_tokens: int,
    window_units: int,
    shuffle_seed: int = 0,
    kinds: NDArray[np.int64] | None = None,
) -> list[Window]:
    """Return the windows of an epoch, in order; each of `samples` stands in exactly one step.

    Args:
        samples: [n] indices of the samples to train on.
        lengths: [S] tokens of every sample of the store.
        units: [S] unit of every sample of the store.
        seed: of the order of units.
        epoch: counted from 0.
        tokens_per_step: tokens of a step; a longer sample still makes a step.
        micro_batch_tokens: tokens of a batch within a step; 0: the whole step is one batch.
        window_units: units in a window.
        shuffle_seed: of the order within a window.
        kinds: [S] kind of every sample, the same throughout a unit; the units of each kind are
            spread evenly over the epoch. None: all are of one kind.
    """
    unit_order = _order_units(samples, units, kinds, np.random.default_rng([*seed, epoch]))
    random = np.random.default_rng([*seed, epoch, shuffle_seed, _SHUFFLE])
    windows = []
    by_unit = _samples_by_unit(samples, units)
    for first in range(0, len(unit_order), window_units):
        chosen = unit_order[first : first + window_units]
        inside = np.sort(np.concatenate([by_unit[unit] for unit in chosen.tolist()]))
        shuffled = inside[random.permutation(len(inside))]
        steps = _cut_evenly(shuffled, lengths, budget=tokens_per_step)
        windows.append(
            Window(
                units=tuple(chosen.tolist()),
                steps=tuple(
                    tuple(_cut(step, lengths, budget=micro_batch_tokens or tokens_per_step))
                    for step in steps
                ),
            )
        )
    return windows


def plan_pass(
    samples: NDArray[np.int64],
    *,
    lengths: NDArray[np.int32],
    units: NDArray[np.int64],
    tokens_per_step: int,
) -> list[Window]:
    """Return one pass over `samples` in store order, a unit at a time: for evaluation."""
    windows = []
    for unit, inside in sorted(_samples_by_unit(samples, units).items()):
        batches = _cut(inside, lengths, budget=tokens_per_step)
        windows.append(Window(units=(unit,), steps=tuple((batch,) for batch in batches)))
    return windows


def seek(windows: Sequence[Window], step: int) -> list[Window]:
    """Return the windows that are left once `step` steps are done; nothing is read to get there."""
    left = []
    for window in windows:
        if step < len(window.steps):
            left.append(Window(units=window.units, steps=window.steps[step:]))
        step = max(0, step - len(window.steps))
    return left


def count_steps(windows: Sequence[Window]) -> int:
    """Return the number of steps of `windows`."""
    return sum(len(window.steps) for window in windows)


def rank_rows(batch: NDArray[np.int64], *, rank: int, world_size: int) -> NDArray[np.int64]:
    """Return the samples of `batch` that process `rank` of `world_size` takes."""
    return batch[rank::world_size]


def _cut_evenly(
    samples: NDArray[np.int64], lengths: NDArray[np.int32], *, budget: int
) -> list[NDArray[np.int64]]:
    # A plain cut leaves one stub of a step. The smallest budget that needs no more steps than
    # the full one spreads it over the others.
    num_steps = len(_cut(samples, lengths, budget=budget))
    low, high = min(budget, int(lengths[samples].max())), budget
    while low < high:
        middle = (low + high) // 2
        if len(_cut(samples, lengths, budget=middle)) <= num_steps:
            high = middle
        else:
            low = middle + 1
    return _cut(samples, lengths, budget=high)


def _cut(
    samples: NDArray[np.int64], lengths: NDArray[np.int32], *, budget: int
) -> list[NDArray[np.int64]]:
    """Cut `samples`, in their order, into runs of at most `budget` tokens."""
    ends = np.cumsum(lengths[samples], dtype=np.int64)
    runs = []
    first, used = 0, 0
    while first < len(samples):
        stop = max(first + 1, int(np.searchsorted(ends, used + budget, side="right")))
        runs.append(samples[first:stop])
        first, used = stop, int(ends[stop - 1])
    return runs


def _order_units(
    samples: NDArray[np.int64],
    units: NDArray[np.int64],
    kinds: NDArray[np.int64] | None,
    random: np.random.Generator,
) -> NDArray[np.int64]:
    found, first = np.unique(units[samples], return_index=True)
    if kinds is None:
        return random.permutation(found)
    kind_of_unit = kinds[samples[first]]
    places = np.empty(len(found))
    for kind in np.unique(kind_of_unit).tolist():
        inside = np.flatnonzero(kind_of_unit == kind)
        # One unit in each n-th part of the epoch, somewhere within it.
        places[random.permutation(inside)] = np.arange(len(inside)) + random.random(len(inside))
        places[inside] /= len(inside)
    return found[np.argsort(places, kind="stable")]


def _samples_by_unit(
    samples: NDArray[np.int64], units: NDArray[np.int64]
) -> dict[int, NDArray[np.int64]]:
    by_unit = samples[np.argsort(units[samples], kind="stable")]
    found, first = np.unique(units[by_unit], return_index=True)
    return dict(zip(found.tolist(), np.split(by_unit, first[1:]), strict=True))
