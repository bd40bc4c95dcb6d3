"""Stream steps of batches from a store, decoded by background threads ahead of use.

The sampler plans the order, the stream reads it. While the steps of one window are in use the next
window is decoded: at most two are in memory. Rows are decoded straight into the memory of their
batch, which is reused once nobody holds the batch. Letters: B samples of a batch, N its tokens,
D base width.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from carryon.cache.store.buffers import BufferPool
from carryon.cache.store.shard_reader import CopyRange
from carryon.cache.store.view import StoreLike
from carryon.train.config import StreamSettings
from carryon.train.data.batch import Batch, make_batch
from carryon.train.data.sampler import Window


class Stream:
    """An iterator over the steps of `windows`, and a context manager that ends its threads."""

    def __init__(
        self,
        store: StoreLike,
        windows: Iterable[Window],
        *,
        taps: Sequence[str],
        settings: StreamSettings,
        is_pinned: bool,
    ) -> None:
        """Start to read.

        Args:
            store: to read.
            windows: units to read and the steps made of them, in order; of a sequence the largest
                batch is known from the start, so that all memory is reused.
            taps: whose states are read.
            settings: number of threads.
            is_pinned: put batches into pinned memory.
        """
        self.wait_s = 0.0
        """Seconds that the consumer has waited for data."""
        self._store = store
        self._windows = iter(windows)
        self._taps = list(taps)
        self._is_pinned = is_pinned
        self._memory = BufferPool(max_free=0)
        self._left_bytes = self._most_batches = 0
        self._max_tokens = 1
        self._is_known = isinstance(windows, Sequence)
        if isinstance(windows, Sequence):
            self._make_room(windows)
        self._pool = ThreadPoolExecutor(settings.reader_threads, "carryon-reader")
        self._decoding: list[tuple[list[list[_BatchRows]], list[Future[None]]]] = []
        for _ in range(2):
            self._decode_next()

    def __enter__(self) -> Self:
        """Return the stream."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop reading and end the threads."""
        self._pool.shutdown(cancel_futures=True)

    @property
    def made_bytes(self) -> int:
        """Bytes of hidden states allocated so far; later batches reuse them."""
        return self._left_bytes + self._memory.made_bytes

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step; errors of the threads are raised here."""
        while self._decoding:
            steps, tasks = self._decoding.pop(0)
            started_at = time.perf_counter()
            for task in tasks:
                task.result()
            self.wait_s += time.perf_counter() - started_at
            steps.reverse()
            while steps:  # each step is let go of as it is yielded
                yield [rows.to_batch(is_pinned=self._is_pinned) for rows in steps.pop()]
            self._decode_next()

    def _decode_next(self) -> None:
        """Give the threads the next window."""
        for window in itertools.islice(self._windows, 1):
            if not self._is_known:
                self._make_room([window])
            steps = [[self._allocate(samples) for samples in step] for step in window.steps]
            tasks = _tasks(self._store, window.units, steps)
            self._decoding.append((steps, [self._pool.submit(task) for task in tasks]))

    def _make_room(self, windows: Sequence[Window]) -> None:
        """Keep as much memory as these windows need, and what those before needed."""
        counts = [sum(map(len, window.steps)) for window in windows]
        self._most_batches = max([self._most_batches, *counts])
        max_tokens = _max_ordinary_tokens(self._store, windows)
        if max_tokens > self._max_tokens:  # no later batch has room in the blocks made so far
            self._memory.close()
            self._left_bytes += self._memory.made_bytes
            self._memory, self._max_tokens = BufferPool(max_free=0), max_tokens
        self._memory.keep(2 * len(self._taps) * self._most_batches)

    def _allocate(self, samples: NDArray[np.int64]) -> "_BatchRows":
        """Return memory for a batch, with anything in it."""
        store = self._store
        lengths = store.sample_lengths[samples].astype(np.int64)
        num_rows = int(lengths.sum())
        room = _allocated_rows(num_rows, self._max_tokens)
        states = {}
        for tap in self._taps:
            taken = self._memory.take(room * store.row_bytes([tap]))
            shape = (room, store.tap_width(tap))
            states[tap] = taken.view(store.tap_dtype(tap)).reshape(shape)[:num_rows]
        return _BatchRows(
            samples=samples,
            lengths=lengths,
            tokens=np.empty(num_rows, dtype=np.int32),
            loss_mask=np.empty(num_rows, dtype=np.uint8),
            states=states,
        )


def stream_bytes(store: StoreLike, windows: Sequence[Window], *, taps: Sequence[str]) -> int:
    """Return the maximum bytes of hidden states in memory: of two windows and a batch in use."""
    max_tokens = _max_ordinary_tokens(store, windows)
    sizes = [
        [
            _allocated_rows(int(store.sample_lengths[samples].sum()), max_tokens)
            for step in window.steps
            for samples in step
        ]
        for window in windows
    ]
    rows = 2 * max(map(sum, sizes), default=0) + max(map(max, sizes), default=0)
    return rows * store.row_bytes(taps)


@dataclass(frozen=True, kw_only=True, slots=True)
class _BatchRows:
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
    """[N, D] for each tap, in the store's array type."""

    def to_batch(self, *, is_pinned: bool) -> Batch:
        """Return the batch, once its rows are decoded."""
        return make_batch(
            self.samples,
            self.lengths,
            tokens=self.tokens,
            loss_mask=self.loss_mask,
            states=self.states,
            is_pinned=is_pinned,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a sample lies in its unit and in its batch."""

    first: int
    stop: int
    batch: _BatchRows
    rows: slice


def _max_ordinary_tokens(store: StoreLike, windows: Sequence[Window]) -> int:
    """Return the tokens of the largest batch, except single samples, which may be far longer."""
    lengths = store.sample_lengths
    batches = [samples for window in windows for step in window.steps for samples in step]
    several = [samples for samples in batches if len(samples) > 1] or batches
    return max((int(lengths[samples].sum()) for samples in several), default=1)


def _allocated_rows(num_rows: int, max_tokens: int) -> int:
    """Return the rows to allocate for a batch: the same for similar sizes, so they are reusable."""
    return -(-num_rows // max_tokens) * max_tokens


def _tasks(
    store: StoreLike, units: Sequence[int], steps: Sequence[Sequence[_BatchRows]]
) -> list[Callable[[], None]]:
    """Return what decodes the batches: for each unit its tokens, and its states at each tap."""
    by_unit: dict[int, list[_Place]] = {unit: [] for unit in units}
    for batch in (batch for step in steps for batch in step):
        to = 0
        starts = store.sample_starts[batch.samples].tolist()
        for start, length in zip(starts, batch.lengths.tolist(), strict=True):
            unit, first = divmod(start, store.unit_tokens)
            rows = slice(to, to + length)
            by_unit[unit].append(_Place(first=first, stop=first + length, batch=batch, rows=rows))
            to += length
    tasks: list[Callable[[], None]] = []
    for unit, places in by_unit.items():
        places.sort(key=lambda place: place.first)
        if places:
            tasks.append(partial(_copy_tokens, store, unit, places))
        for tap in places[0].batch.states if places else ():
            moves = [
                CopyRange(
                    first=place.first, stop=place.stop, to=place.batch.states[tap][place.rows]
                )
                for place in places
            ]
            tasks.append(partial(store.copy_states, unit, tap, moves))
    return tasks


def _copy_tokens(store: StoreLike, unit: int, places: Sequence[_Place]) -> None:
    rows = store.read_unit(unit, taps=[])
    for place in places:
        place.batch.tokens[place.rows] = rows.tokens[place.first : place.stop]
        place.batch.loss_mask[place.rows] = rows.loss_mask[place.first : place.stop]
