"""Steps of batches from a store, read and decoded in background threads ahead of use.

The order is given (order.py); the stream only performs it. Units in memory are bounded by the
largest window plus the units read ahead. It holds no lock and no shared memory: closing it, or
the end of the process, leaves nothing behind.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from carryon.cache.reader import Store, Unit
from carryon.train.batch import Batch, make_batch
from carryon.train.config import StreamSettings
from carryon.train.order import Window

READY_STEPS = 4
"""Steps that wait ready made."""
_CLOSE_CHECK_S = 0.2


class Stream:
    """An iterator over the steps of `windows`; use it in a `with` block."""

    def __init__(
        self,
        store: Store,
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
            settings: how far ahead, with how many threads.
            is_pinned: put batches where an accelerator can fetch them by itself.
        """
        self.wait_s = 0.0
        """Seconds that the consumer has waited for data."""
        self._store = store
        self._windows = list(windows)
        self._taps = list(taps)
        self._settings = settings
        self._is_pinned = is_pinned
        self._ready: queue.Queue[list[Batch] | BaseException | None] = queue.Queue(READY_STEPS)
        self._is_closed = threading.Event()
        self._producer = threading.Thread(target=self._produce, name="carryon-stream", daemon=True)
        self._producer.start()

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
        self._is_closed.set()
        self._producer.join()

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield the batches of each step; errors of the reader are raised here."""
        while True:
            started_at = time.perf_counter()
            item = self._ready.get()
            self.wait_s += time.perf_counter() - started_at
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _produce(self) -> None:
        try:
            with ThreadPoolExecutor(self._settings.reader_threads, "carryon-reader") as pool:
                for window, units in self._read_windows(pool):
                    for step in window.steps:
                        batches = [
                            make_batch(samples, units, taps=self._taps, is_pinned=self._is_pinned)
                            for samples in step
                        ]
                        if not self._put(batches):
                            return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 -- handed to the consumer, who raises it
            self._put(error)

    def _read_windows(self, pool: ThreadPoolExecutor) -> Iterator[tuple[Window, dict[int, Unit]]]:
        to_submit = deque(unit for window in self._windows for unit in window.units)
        submitted: deque[Future[Unit]] = deque()
        for window in self._windows:
            wanted = len(window.units) + self._settings.read_ahead_units
            while to_submit and len(submitted) < wanted:
                submitted.append(pool.submit(self._read, to_submit.popleft()))
            futures = [submitted.popleft() for _ in window.units]
            units = {unit.unit: unit for unit in (future.result() for future in futures)}
            del futures  # they hold the units too
            yield window, units
            units.clear()  # before the next window is waited for

    def _read(self, unit: int) -> Unit:
        if self._is_closed.is_set():
            raise RuntimeError("the stream was closed")
        return self._store.read_unit(unit, taps=self._taps)

    def _put(self, item: list[Batch] | BaseException | None) -> bool:
        """Hand `item` over; False if the stream was closed meanwhile."""
        while not self._is_closed.is_set():
            try:
                self._ready.put(item, timeout=_CLOSE_CHECK_S)
            except queue.Full:
                continue
            return True
        return False


def stream_bytes(
    store: Store, *, taps: Sequence[str], settings: StreamSettings, batch_tokens: int
) -> int:
    """Return the most bytes of hidden states in memory at one time: units, and steps made."""
    item_bytes = 4 if store.manifest.settings["dtype"] == "float32" else 2
    row_bytes = store.width * item_bytes * len(taps)
    num_units = min(settings.window_units + settings.read_ahead_units, store.num_units)
    # Beside the steps that wait, one is being made and one is in use.
    return (num_units * store.manifest.unit_tokens + (READY_STEPS + 2) * batch_tokens) * row_bytes
