"""Encode, write and commit units in threads while the base runs over later ones.

Chunks are encoded by a pool (Blosc, the digests and writing let other threads run), and a few
units are written at a time, as each waits for the disk. Memory is bounded: two units are staged,
one of which is being computed, and as many are compressed as there are writers.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from carryon.cache.extraction.stages.staging import Staging
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.receipt import Receipt
from carryon.cache.store.shard_writer import Rows, UnitInput, encode_unit

MAX_ENCODERS = 8
"""Threads that encode, at most: about 6 GB/s of states."""
_STAGED = 2
_WRITERS = 3
_LOOK_S = 0.02
logger = logging.getLogger(__name__)

WriteUnit = Callable[..., Receipt | None]
"""As `carryon.cache.store.shard_writer.write_unit` from the unit's input on; None: another process
has committed it."""


class UnitWriters:
    """Threads that write the units of a store, as a context manager that waits for all of them."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        write: WriteUnit,
        make_staging: Callable[[], Staging],
        *,
        num_encoders: int,
    ) -> None:
        """Prepare.

        Args:
            root: of the store.
            manifest: of the store.
            write: writes and commits an encoded unit.
            make_staging: returns memory for a unit, at most twice.
            num_encoders: threads that encode chunks.
        """
        self._root, self._manifest, self._write = root, manifest, write
        self.receipts: list[Receipt] = []
        """Of the units that this process has committed, since errors were last looked for."""
        self.waited_s = {"encode": 0.0, "write": 0.0}
        """Seconds that the forward passes waited for memory, by the stage that had it."""
        self._make, self._num_staged = make_staging, 0
        self._free: queue.SimpleQueue[Staging] = queue.SimpleQueue()
        self._change = threading.Condition()
        self._expected: dict[int, int] = {}
        """Unit that is not written yet -> most bytes that it will add."""
        self._num_encoding = 0
        self._jobs: list[Future[Receipt | None]] = []
        self._encoders = ThreadPoolExecutor(num_encoders, "carryon-encoder")
        self._writers = ThreadPoolExecutor(_WRITERS, "carryon-writer")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._writers.shutdown()
        self._encoders.shutdown()
        for job in self._jobs:
            if (other := job.exception()) is not None and other is not error:
                logger.warning(f"a unit was not written: {other}")  # `error` is raised, not this

    def expect(self, unit: int, max_bytes: int) -> None:
        """Count a unit as one that will be written; any thread may call it."""
        with self._change:
            self._expected[unit] = max_bytes

    def expected_bytes(self) -> int:
        """Return the most bytes that expected units will add; 0: all are written."""
        with self._change:
            return sum(self._expected.values())

    def wait_for_one(self, timeout_s: float) -> None:
        """Wait until one more of the expected units is written, for a while."""
        with self._change:
            count = len(self._expected)
            self._change.wait_for(lambda: len(self._expected) < count, timeout_s)

    def take(self) -> Staging:
        """Return memory for the states of a unit, once there is some.

        Raises:
            CarryOnError: what a writer has raised.
        """
        self.collect()
        if self._free.empty() and self._num_staged < _STAGED:
            self._num_staged += 1
            return self._make()
        while True:
            try:
                with self._timed_wait():
                    return self._free.get(timeout=_LOOK_S)
            except queue.Empty:
                self.collect()

    @contextmanager
    def _timed_wait(self) -> Iterator[None]:
        started_at, stage = time.perf_counter(), "encode" if self._num_encoding else "write"
        try:
            yield
        finally:
            self.waited_s[stage] += time.perf_counter() - started_at

    def submit(
        self, unit_input: UnitInput, states: Staging | Mapping[str, Rows], *, elapsed_s: float
    ) -> None:
        """Encode, write and commit a unit in threads.

        Args:
            unit_input: of the unit.
            states: of the unit; memory that was taken is given back once they are encoded.
            elapsed_s: seconds its computation took.
        """
        while not isinstance(states, Staging) and len(self._jobs) >= _STAGED:
            with self._timed_wait():
                wait(self._jobs, _LOOK_S, FIRST_COMPLETED)  # whose memory nothing else bounds
            self.collect()
        self._jobs.append(self._writers.submit(self._run, unit_input, states, elapsed_s))

    def collect(self, *, waits: bool = False) -> None:
        """Add the receipts of written units to `receipts`.

        Args:
            waits: wait until all are written.

        Raises:
            CarryOnError: what a writer has raised.
        """
        waiting = []
        for job in self._jobs:
            if not (waits or job.done()):
                waiting.append(job)
            elif (receipt := job.result()) is not None:
                self.receipts.append(receipt)
        self._jobs = waiting

    def _run(
        self, unit_input: UnitInput, states: Staging | Mapping[str, Rows], elapsed_s: float
    ) -> Receipt | None:
        try:
            with self._change:
                self._num_encoding += 1
            try:
                num_tokens = unit_input.num_tokens
                rows = states.rows(num_tokens) if isinstance(states, Staging) else states
                encoded = encode_unit(
                    self._root, self._manifest, unit_input, rows, pool=self._encoders
                )
            finally:
                with self._change:
                    self._num_encoding -= 1
                if isinstance(states, Staging):
                    states.clear()
                    self._free.put(states)
            return self._write(unit_input, encoded, elapsed_s=elapsed_s)
        finally:
            with self._change:
                self._expected.pop(unit_input.unit, None)
                self._change.notify_all()
