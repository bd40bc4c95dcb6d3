"""The order of an epoch: a pure function of sample lengths, units, seed and epoch.

Units are read in a seeded random order, a few at a time: a window. Within a window the samples are
sorted by length, cut into batches of little padding, and the batches shuffled. Nothing depends on
how many processes share the work: each takes rows of every batch (`rank_rows`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LENGTH_JITTER = 0.01
"""Relative noise on the lengths that are sorted by: other neighbours in every epoch, for half a
percent of padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Units that are in memory together, and the steps made of their samples."""

    units: tuple[int, ...]
    """Units to read."""
    steps: tuple[tuple[NDArray[np.int64], ...], ...]
    """Steps; each is one or more batches of sample indices, which are padded apart."""


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
        batch_tokens: tokens of a step, pads included; a longer sample still makes a step.
        micro_batch_tokens: tokens of a batch within a step; 0: the whole step is one batch.
        window_units: units in a window.
    """
    random = np.random.default_rng([*seed, epoch])
    unit_order = random.permutation(np.unique(units[samples]))
    windows = []
    for first in range(0, len(unit_order), window_units):
        chosen = unit_order[first : first + window_units]
        inside = samples[np.isin(units[samples], chosen)]
        keys = lengths[inside] * random.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, len(inside))
        by_length = inside[np.argsort(-keys, kind="stable")]
        batches = _cut_evenly(by_length, lengths, budget=micro_batch_tokens or batch_tokens)
        shuffled = [batches[index] for index in random.permutation(len(batches))]
        steps = _group_steps(shuffled, lengths, budget=batch_tokens)
        windows.append(Window(units=tuple(chosen.tolist()), steps=steps))
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
        by_length = inside[np.argsort(-lengths[inside], kind="stable")]
        batches = _cut(by_length, lengths, budget=batch_tokens)
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


def padding_waste(windows: Sequence[Window], lengths: NDArray[np.int32]) -> float:
    """Return the part of all batch rows that are pads."""
    batches = [batch for window in windows for step in window.steps for batch in step]
    padded = sum(_padded_tokens(batch, lengths) for batch in batches)
    real = sum(int(lengths[batch].sum()) for batch in batches)
    return 1 - real / padded if padded else 0.0


def rank_rows(batch: NDArray[np.int64], *, rank: int, world_size: int) -> NDArray[np.int64]:
    """Return the samples of `batch` that process `rank` of `world_size` takes."""
    return batch[rank::world_size]


def _cut_evenly(
    by_length: NDArray[np.int64], lengths: NDArray[np.int32], *, budget: int
) -> list[NDArray[np.int64]]:
    # A plain cut leaves one stub of a batch. The smallest budget that needs no more batches than
    # the full one spreads it over the others.
    batches = _cut(by_length, lengths, budget=budget)
    low, high = int(lengths[by_length].max()), budget
    while low < high:
        middle = (low + high) // 2
        if len(_cut(by_length, lengths, budget=middle)) <= len(batches):
            high = middle
        else:
            low = middle + 1
    return _cut(by_length, lengths, budget=max(high, 1))


def _cut(
    by_length: NDArray[np.int64], lengths: NDArray[np.int32], *, budget: int
) -> list[NDArray[np.int64]]:
    batches = []
    first = 0
    while first < len(by_length):
        rows = max(1, budget // int(lengths[by_length[first]]))
        # With jitter the first is not always the longest.
        while rows > 1 and _padded_tokens(by_length[first : first + rows], lengths) > budget:
            rows -= 1
        batches.append(by_length[first : first + rows])
        first += rows
    return batches


def _group_steps(
    batches: list[NDArray[np.int64]], lengths: NDArray[np.int32], *, budget: int
) -> tuple[tuple[NDArray[np.int64], ...], ...]:
    steps: list[list[NDArray[np.int64]]] = []
    used = budget
    for batch in batches:
        tokens = _padded_tokens(batch, lengths)
        if used + tokens > budget:
            steps.append([])
            used = 0
        steps[-1].append(batch)
        used += tokens
    return tuple(tuple(step) for step in steps)


def _padded_tokens(batch: NDArray[np.int64], lengths: NDArray[np.int32]) -> int:
    return int(lengths[batch].max()) * len(batch)
