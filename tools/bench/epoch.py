"""Epochs in random order into ready batches, from a store or from a peer's layout."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carryon.cache.format.quantization import STEPS
from carryon.cache.format.zarr_metadata import ROW_ARRAYS, row_path, state_paths
from carryon.cache.store.reader import Store
from carryon.cache.store.samples import Unit
from carryon.cache.store.shard_reader import CopyRange
from carryon.tools.bench.disk import Charge
from carryon.tools.bench.peers import Peer
from carryon.tools.bench.states import StateSet
from carryon.train.config import OptimizationSettings, StreamSettings, TrainSettings
from carryon.train.data.batch import Batch
from carryon.train.data.datasets import open_data
from carryon.train.data.loader import Stream
from carryon.train.data.sampler import plan_epoch

BATCH_TOKENS = 4096
"""Tokens of a batch of ours; the peers' hold as many."""
EPOCHS = 3
"""Epochs per run. The figures cover all of them: the caches are warm after a tenth of the first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """Throughput of a few epochs."""

    num_tokens: int
    """Tokens in ready batches, without padding."""
    num_rows: int
    """Rows of those batches, with padding."""
    elapsed_s: float
    cpu_s: float
    """CPU time of all threads."""

    @property
    def tokens_per_second(self) -> float:
        """Throughput without padding."""
        return self.num_tokens / self.elapsed_s


def iter_batches(
    store: Store, *, taps: Sequence[str], tokens_per_step: int = 1024
) -> Iterator[Batch]:
    """Yield the batches of an epoch as training reads them."""
    data = open_data([str(store.root)], TrainSettings(), taps=taps)
    [windows] = data.plan(OptimizationSettings(epochs=1, tokens_per_step=tokens_per_step))
    with Stream(data.store, windows, taps=taps, settings=data.settings, is_pinned=False) as steps:
        for batches in steps:
            yield from batches


def run_store_epoch(store: Store, *, seed: int, settings: StreamSettings, charge: Charge) -> Epoch:
    """Stream a store as the trainer does, in the order of its first epochs."""
    started = _clocks()
    windows = [
        window
        for epoch in range(EPOCHS)
        for window in plan_epoch(
            np.arange(store.num_samples),
            lengths=store.sample_lengths,
            units=store.sample_starts // store.manifest.unit_tokens,
            seed=[seed],
            epoch=epoch,
            tokens_per_step=BATCH_TOKENS,
            micro_batch_tokens=0,
            window_units=settings.window_units,
        )
    ]
    num_tokens, num_rows = 0, 0
    charged = ChargedStore(store, charge)
    with Stream(charged, windows, taps=store.taps, settings=settings, is_pinned=False) as stream:
        for step in stream:
            for batch in step:
                num_tokens += batch.num_tokens
                num_rows += batch.tokens.numel()
    return _epoch(started, num_tokens, num_rows)


def run_peer_epoch(
    peer: Peer, states: StateSet, folder: Path, *, seed: int, num_threads: int, charge: Charge
) -> Epoch:
    """Read a peer's files in random order; threads prepare whole batches ahead of use."""
    started = _clocks()
    batches = [
        batch
        for epoch in range(EPOCHS)
        for batch in peer.batch(states.lengths, np.random.default_rng([seed, epoch]))
    ]
    load = peer.open(states, folder, charge)
    num_rows = 0
    with ThreadPoolExecutor(num_threads) as pool:
        to_submit, pending = deque(batches), deque[Future[dict[str, Any]]]()
        while to_submit or pending:
            while to_submit and len(pending) < 2 * num_threads:
                pending.append(pool.submit(load, to_submit.popleft()))
            num_rows += pending.popleft().result()["input_ids"].numel()
    num_tokens = sum(int(states.lengths[batch].sum()) for batch in batches)
    return _epoch(started, num_tokens, num_rows)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _epoch(started: tuple[float, float], num_tokens: int, num_rows: int) -> Epoch:
    elapsed_s, cpu_s = (now - then for now, then in zip(_clocks(), started, strict=True))
    return Epoch(num_tokens=num_tokens, num_rows=num_rows, elapsed_s=elapsed_s, cpu_s=cpu_s)


class ChargedStore(Store):
    """A store that charges each file before it is read."""

    def __init__(self, store: Store, charge: Charge) -> None:
        super().__init__(store.root, store.manifest, store.finished_units, decoded=store.decoded)
        self._charge = charge

    def read_unit(self, unit: int, *, taps: Sequence[str] | None = None) -> Unit:
        self._charge_files(unit, [row_path(name, unit) for name in ROW_ARRAYS])
        return super().read_unit(unit, taps=taps)

    def copy_states(self, unit: int, tap: str, moves: Sequence[CopyRange]) -> None:
        if self.decoded is not None:  # filled before: its files hold the rows as they are read
            self._charge(self.receipt(unit).num_tokens * self.row_bytes([tap]))
            super().copy_states(unit, tap, moves)
            return
        is_lossy = self.manifest.settings["profile"] in STEPS
        self._charge_files(unit, state_paths([tap], unit, is_lossy=is_lossy))
        super().copy_states(unit, tap, moves)

    def _charge_files(self, unit: int, paths: Sequence[str]) -> None:
        files = self.receipt(unit).files
        self._charge(sum(files[path].bytes for path in paths))
