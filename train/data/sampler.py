"""The order of an epoch: a pure function of sample lengths, units, seeds and epoch.

Units are read in a seeded random order, a few at a time: a window. Within a window the samples are
shuffled and cut into steps of a number of tokens. One seed decides which units make a window,
another the order of their samples: runs of several seeds and batch sizes share one read of the
store (joint_sampler.py). Batches have no padding, so samples are not grouped by length, which would
also group them by kind. The order does not depend on the number of processes: each takes samples of
every batch (`rank_rows`).
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import sub
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SHUFFLE = 1
"""Makes the random numbers of the order within windows differ from those of the units' order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Units that are in memory together, and the steps made of their samples."""

    units: tuple[int, ...]
    steps: tuple[tuple[NDArray[np.int64], ...], ...]
    """Steps; each is one or more batches of sample indices, computed one after another."""


def iter_epoch(
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
) -> Iterator[Window]:
    """Yield the windows of an epoch, in order; each of `samples` is in exactly one step.

    Each is planned as it is asked for: of a million units all of them take a minute.

    Args:
        samples: [n] indices of the samples.
        lengths: [S] tokens of every sample of the store.
        units: [S] unit of every sample of the store.
        seed: of the order of units.
        epoch: counted from 0.
        tokens_per_step: maximum tokens of a step; a longer sample is a step.
        micro_batch_tokens: maximum tokens of a batch within a step. 0: the step is one batch.
        window_units: units in a window.
        shuffle_seed: of the order within a window.
        kinds: [S] kind of every sample, the same within a unit; the units of each kind are spread
            evenly over the epoch. None: all are of one kind.
    """
    unit_order = _order_units(samples, units, kinds, np.random.default_rng([*seed, epoch]))
    random = np.random.default_rng([*seed, epoch, shuffle_seed, _SHUFFLE])
    by_window, bounds = _group_by_window(samples, units, unit_order, window_units=window_units)
    batch_tokens = micro_batch_tokens or tokens_per_step
    for number, (low, high) in enumerate(pairwise(bounds)):
        chosen = unit_order[number * window_units : (number + 1) * window_units]
        shuffled = by_window[low:high][random.permutation(high - low)]
        ends = np.cumsum(lengths[shuffled], dtype=np.int64).tolist()
        steps, first = [], 0
        for stop in _find_even_stops(ends, budget=tokens_per_step):
            batches = _find_stops(ends, budget=batch_tokens, first=first, last=stop)
            steps.append(tuple(_split(shuffled, batches, first=first)))
            first = stop
        yield Window(units=tuple(chosen.tolist()), steps=tuple(steps))


def plan_epoch(samples: NDArray[np.int64], **options: Any) -> list[Window]:  # noqa: ANN401
    """Return the windows of an epoch; arguments as of `iter_epoch`."""
    return list(iter_epoch(samples, **options))


def plan_pass(
    samples: NDArray[np.int64],
    *,
    lengths: NDArray[np.int32],
    units: NDArray[np.int64],
    tokens_per_step: int,
) -> list[Window]:
    """Return one pass over `samples` in stored order, a unit at a time."""
    windows = []
    for unit, inside in sorted(_samples_by_unit(samples, units).items()):
        ends = np.cumsum(lengths[inside], dtype=np.int64).tolist()
        batches = _split(inside, _find_stops(ends, budget=tokens_per_step))
        windows.append(Window(units=(unit,), steps=tuple((batch,) for batch in batches)))
    return windows


def iter_steps(windows: Iterable[Window], *, first: int, stride: int = 1) -> Iterator[Window]:
    """Yield every `stride`-th step from step `first` on; windows without any are left out.

    With a stride of 1 it is a seek: nothing is read to get to `first`.
    """
    start = 0
    for window in windows:
        offset = first - start if first > start else (first - start) % stride
        if steps := window.steps[offset::stride]:
            yield replace(window, steps=steps)
        start += len(window.steps)


def take_steps(windows: Iterable[Window], *, first: int, stride: int = 1) -> list[Window]:
    """Return what `iter_steps` yields."""
    return list(iter_steps(windows, first=first, stride=stride))


def count_steps(windows: Sequence[Window]) -> int:
    """Return the number of steps of `windows`."""
    return sum(len(window.steps) for window in windows)


def rank_rows(batch: NDArray[np.int64], *, rank: int, world_size: int) -> NDArray[np.int64]:
    """Return the samples of `batch` that process `rank` of `world_size` takes."""
    return batch[rank::world_size]


def _find_even_stops(ends: list[int], *, budget: int) -> list[int]:
    # A plain cut leaves a short last run. The smallest budget that needs no more runs than the
    # full one spreads it over the others. It is no less than a run's share of all tokens.
    stops = _find_stops(ends, budget=budget)
    longest = max(map(sub, ends, [0, *ends]))
    low, high = min(budget, max(longest, -(-ends[-1] // len(stops)))), budget
    while low < high:
        middle = (low + high) // 2
        fewer = _find_stops(ends, budget=middle)
        if len(fewer) <= len(stops):
            high, stops = middle, fewer
        else:
            low = middle + 1
    return stops


def _find_stops(
    ends: list[int], *, budget: int, first: int = 0, last: int | None = None
) -> list[int]:
    """Return where runs of at most `budget` tokens stop.

    An epoch has millions of them, and to find a place in a list takes a tenth of what it takes in
    an array.

    Args:
        ends: tokens of each sample and of all before it.
        budget: maximum tokens of a run; a longer sample is a run.
        first, last: samples to cut, the last excluded. None: to the end.
    """
    stops = []
    last = len(ends) if last is None else last
    stop, used = first, ends[first - 1] if first else 0
    while stop < last:
        stop = bisect_right(ends, used + budget, stop + 1, last)
        used = ends[stop - 1]
        stops.append(stop)
    return stops


def _split(
    samples: NDArray[np.int64], stops: list[int], *, first: int = 0
) -> list[NDArray[np.int64]]:
    return [samples[first:stop] for first, stop in pairwise([first, *stops])]


def _order_units(
    samples: NDArray[np.int64],
    units: NDArray[np.int64],
    kinds: NDArray[np.int64] | None,
    random: np.random.Generator,
) -> NDArray[np.int64]:
    distinct, first = np.unique(units[samples], return_index=True)
    if kinds is None:
        return random.permutation(distinct)
    kind_of_unit = kinds[samples[first]]
    places = np.empty(len(distinct))
    for kind in np.unique(kind_of_unit).tolist():
        inside = np.flatnonzero(kind_of_unit == kind)
        # One unit in each n-th part of the epoch, somewhere within it.
        places[random.permutation(inside)] = np.arange(len(inside)) + random.random(len(inside))
        places[inside] /= len(inside)
    return distinct[np.argsort(places, kind="stable")]


def _group_by_window(
    samples: NDArray[np.int64],
    units: NDArray[np.int64],
    unit_order: NDArray[np.int64],
    *,
    window_units: int,
) -> tuple[NDArray[np.int64], list[int]]:
    """Return `samples` by window, ascending within each, and where windows begin, with the end."""
    ascending, places = np.sort(samples), np.argsort(unit_order)
    windows = places[np.searchsorted(unit_order, units[ascending], sorter=places)] // window_units
    order = np.argsort(windows, kind="stable")
    num_windows = -(-len(unit_order) // window_units)
    bounds = np.searchsorted(windows[order], np.arange(num_windows + 1))
    return ascending[order], bounds.tolist()


def _samples_by_unit(
    samples: NDArray[np.int64], units: NDArray[np.int64]
) -> dict[int, NDArray[np.int64]]:
    by_unit = samples[np.argsort(units[samples], kind="stable")]
    distinct, first = np.unique(units[by_unit], return_index=True)
    return dict(zip(distinct.tolist(), np.split(by_unit, first[1:]), strict=True))
