"""The order of an epoch: a pure function of sample lengths, units, seed and epoch.

Units are read in a seeded random order, a few at a time: a window. Within a window the samples are
shuffled and cut into steps of so many tokens. Batches are flat (batch.py), so neighbours need not
be of one length: grouping by length would also group by kind. Nothing depends on how many
processes share the work: each takes samples of every batch (`rank_rows`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
    batch_tokens: int,
    micro_batch_tokens: int,
    window_units: int,
) -> list[Window]:
    """Return the windows of an epoch, in order; each of `samples` stands in exactly one step.

    Args:
        samples: [n] indices of the samples to train on.
        lengths: [S] tokens of every sample of the store.
        units: [S] unit of every sample of the store.
        seed: of the whole run.
        epoch: counted from 0.
        batch_tokens: tokens of a step; a longer sample still makes a step.
        micro_batch_tokens: tokens of a batch within a step; 0: the whole step is one batch.
        window_units: units in a window.
    """
    random = np.random.default_rng([*seed, epoch])
    unit_order = random.permutation(np.unique(units[samples]))
    windows = []
    for first in range(0, len(unit_order), window_units):
        chosen = unit_order[first : first + window_units]
        inside = samples[np.isin(units[samples], chosen)]
        shuffled = inside[random.permutation(len(inside))]
        steps = _cut_evenly(shuffled, lengths, budget=batch_tokens)
        windows.append(
            Window(
                units=tuple(chosen.tolist()),
                steps=tuple(
                    tuple(_cut(step, lengths, budget=micro_batch_tokens or batch_tokens))
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
    batch_tokens: int,
) -> list[Window]:
    """Return one pass over `samples` in store order, a unit at a time: for evaluation."""
    windows = []
    for unit in np.unique(units[samples]).tolist():
        inside = samples[units[samples] == unit]
        batches = _cut(inside, lengths, budget=batch_tokens)
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
    low, high = int(lengths[samples].max()), max(budget, int(lengths[samples].max()))
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
    runs = []
    first, used = 0, 0
    for position, length in enumerate(lengths[samples].tolist()):
        if position > first and used + length > budget:
            runs.append(samples[first:position])
            first, used = position, 0
        used += length
    if first < len(samples):
        runs.append(samples[first:])
    return runs
