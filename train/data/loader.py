"""Steps of batches from a store, read and decoded in background threads ahead of use.

The order is given (order.py); the stream only performs it. While the steps of one window are in
use the next one is decoded: two windows are in memory, no more. It holds no lock and no shared
memory: closing it, or the end of the process, leaves nothing behind.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from carryon.cache.buffers import BufferPool
from carryon.cache.store.view import StoreLike
from carryon.train.config import StreamSettings
from carryon.train.data.batch import Batch
from carryon.train.data.sampler import Window
from carryon.train.data.window import (
    WindowData,
    fill_tasks,
    memory_rows,
    ordinary_tokens,
    take_window,
)


class Stream:
    """An iterator over the steps of `windows`; use it in a `with` block."""

    def __init__(
        self,
        store: StoreLike,
        windows: Sequence[Window],
        *,
        taps: Sequence[str],
        settings: StreamSettings,
        is_pinned: bool,
    ) -> None:
        """Begin to read.

        Args:
            store: where the units are.
            windows: which units, and the steps made of them, in order.
            taps: whose states are wanted.
            settings: with how many threads.
            is_pinned: put batches where an accelerator can fetch them by itself.
        """
        self.wait_s = 0.0
        """Seconds that the consumer has waited for data."""
        self._store = store
        self._windows = list(windows)
        self._taps = list(taps)
        self._is_pinned = is_pinned
        self._memory = BufferPool(max_free=2 * len(self._taps) * _most_batches(self._windows))
        self._ordinary_tokens = ordinary_tokens(store, self._windows)
        self._pool = ThreadPoolExecutor(settings.reader_threads, "carryon-reader")
        self._filling: list[tuple[WindowData, list[Future[None]]]] = []
        for _ in range(2):
            self._fill_next()

    def __enter__(self) -> "Stream":
        """Return the stream."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop reading and end the threads."""
        self._pool.shutdown(cancel_futures=True)

    @property
    def made_bytes(self) -> int:
        """Bytes of hidden states that were taken from the system, to be used again and again."""
        return self._memory.made_bytes

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step; errors of the reader are raised here."""
        while self._filling:
            data, tasks = self._filling.pop(0)
            started_at = time.perf_counter()
            for task in tasks:
                task.result()
            self.wait_s += time.perf_counter() - started_at
            yield from data.take_steps(is_pinned=self._is_pinned)
            self._fill_next()

    def _fill_next(self) -> None:
        """Give the threads the next window to decode."""
        if not self._windows:
            return
        window = self._windows.pop(0)
        data = take_window(
            self._store,
            window,
            taps=self._taps,
            memory=self._memory,
            max_tokens=self._ordinary_tokens,
        )
        tasks = fill_tasks(self._store, data)
        self._filling.append((data, [self._pool.submit(task) for task in tasks]))


def stream_bytes(store: StoreLike, windows: Sequence[Window], *, taps: Sequence[str]) -> int:
    """Return the most bytes of hidden states in memory at one time.

    Those of two windows, and of the batch in use.
    """
    max_tokens = ordinary_tokens(store, windows)
    sizes = [
        [
            memory_rows(int(store.sample_lengths[samples].sum()), max_tokens)
            for step in window.steps
            for samples in step
        ]
        for window in windows
    ]
    rows = 2 * max(map(sum, sizes), default=0) + max(map(max, sizes), default=0)
    return rows * store.width * store.states_dtype.itemsize * len(taps)


def _most_batches(windows: Sequence[Window]) -> int:
    return max((sum(map(len, window.steps)) for window in windows), default=0)
