"""The samples of a window, decoded straight into the batches of its steps.

Nothing is copied again after decoding. Each batch has memory of its own, which is used again once
nobody holds the batch. Letters: B samples of a batch, N its tokens, D base width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.buffers import BufferPool
from carryon.cache.store.shard_reader import CopyRange
from carryon.cache.store.view import StoreLike
from carryon.train.data.batch import Batch, make_batch
from carryon.train.data.sampler import Window


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRows:
    """Memory of one batch."""

    samples: NDArray[np.int64]
    """[B]"""
    lengths: NDArray[np.int64]
    """[B]"""
    tokens: NDArray[np.int32]
    """[N]"""
    loss_mask: NDArray[np.uint8]
    """[N]"""
    states: dict[str, NDArray[Any]]
    """[N, D] for each tap, as the store gives them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowData:
    """Memory of a window's batches; filled by the tasks of `fill_tasks`, in any order."""

    units: tuple[int, ...]
    """Units that the samples lie in."""
    steps: list[list[BatchRows]]
    """As in the window."""

    def take_steps(self, *, is_pinned: bool) -> Iterator[list[Batch]]:
        """Yield the batches of each step, and let go of them."""
        self.steps.reverse()
        while self.steps:
            yield [
                make_batch(
                    rows.samples,
                    rows.lengths,
                    tokens=rows.tokens,
                    loss_mask=rows.loss_mask,
                    states=rows.states,
                    is_pinned=is_pinned,
                )
                for rows in self.steps.pop()
            ]


def take_window(
    store: StoreLike, window: Window, *, taps: Sequence[str], memory: BufferPool, max_tokens: int
) -> WindowData:
    """Return a window's data, with anything in it.

    Args:
        store: where the samples are.
        window: what is wanted.
        taps: whose states are wanted.
        memory: where the states' memory comes from.
        max_tokens: see `ordinary_tokens`.
    """

    def take_rows(samples: NDArray[np.int64]) -> BatchRows:
        lengths = store.sample_lengths[samples].astype(np.int64)
        num_rows, dtype = int(lengths.sum()), store.states_dtype
        room = memory_rows(num_rows, max_tokens)
        states = {}
        for tap in taps:
            taken = memory.take(room * store.width * dtype.itemsize)
            states[tap] = taken.view(dtype).reshape(room, store.width)[:num_rows]
        return BatchRows(
            samples=samples,
            lengths=lengths,
            tokens=np.empty(num_rows, dtype=np.int32),
            loss_mask=np.empty(num_rows, dtype=np.uint8),
            states=states,
        )

    steps = [[take_rows(samples) for samples in step] for step in window.steps]
    return WindowData(units=window.units, steps=steps)


def ordinary_tokens(store: StoreLike, windows: Sequence[Window]) -> int:
    """Return the tokens of the largest batch but for single samples, which may be far longer."""
    lengths = store.sample_lengths
    batches = [samples for window in windows for step in window.steps for samples in step]
    several = [samples for samples in batches if len(samples) > 1] or batches
    return max((int(lengths[samples].sum()) for samples in several), default=1)


def memory_rows(num_rows: int, max_tokens: int) -> int:
    """Return the rows of memory that a batch of `num_rows` takes.

    Batches of slightly different sizes take the same, so that each can take another's.
    """
    return -(-num_rows // max_tokens) * max_tokens


def fill_tasks(store: StoreLike, data: WindowData) -> list[Callable[[], None]]:
    """Return what fills `data`: for each unit its tokens, and its states at each tap."""
    tasks: list[Callable[[], None]] = []
    for unit, places in _places_by_unit(store, data).items():
        tasks.append(partial(_fill_tokens, store, unit, places))
        for tap in places[0].batch.states:
            moves = [
                CopyRange(
                    first=place.first, stop=place.stop, to=place.batch.states[tap][place.rows]
                )
                for place in places
            ]
            tasks.append(partial(store.copy_states, unit, tap, moves))
    return tasks


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a sample lies in its unit and in its batch."""

    first: int
    stop: int
    batch: BatchRows
    rows: slice


def _places_by_unit(store: StoreLike, data: WindowData) -> dict[int, list[_Place]]:
    """Return the places of all samples, by unit, as they follow each other in it."""
    found: dict[int, list[_Place]] = {unit: [] for unit in data.units}
    for batch in (batch for step in data.steps for batch in step):
        to = 0
        starts = store.sample_starts[batch.samples]
        for start, length in zip(starts.tolist(), batch.lengths.tolist(), strict=True):
            unit, first = divmod(start, store.unit_tokens)
            rows = slice(to, to + length)
            found[unit].append(_Place(first=first, stop=first + length, batch=batch, rows=rows))
            to += length
    return {
        unit: sorted(places, key=lambda place: place.first)
        for unit, places in found.items()
        if places
    }


def _fill_tokens(store: StoreLike, unit: int, places: Sequence[_Place]) -> None:
    found = store.read_unit(unit, taps=[])
    for place in places:
        place.batch.tokens[place.rows] = found.tokens[place.first : place.stop]
        place.batch.loss_mask[place.rows] = found.loss_mask[place.first : place.stop]
