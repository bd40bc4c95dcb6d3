"""Epochs in random order into ready batches: from a store, or from another project's files."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carryon.cache.format.quantization import STEPS
from carryon.cache.format.zarr_metadata import ROW_ARRAYS, row_path, state_paths
from carryon.cache.store.reader import Store, Unit
from carryon.cache.store.shard_reader import CopyRange
from carryon.tools.bench.disk import Charge
from carryon.tools.bench.peer import Peer
from carryon.tools.bench.states import StateSet
from carryon.train.config import StreamSettings
from carryon.train.data.loader import Stream
from carryon.train.data.sampler import plan_epoch

BATCH_TOKENS = 4096
"""Tokens of our batches; the peers' hold as many."""
EPOCHS = 3
"""Epochs that are read one after another, as a run of training does: memory and read-ahead are
warm after the first tenth of it. The figures are of all of them together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """What a few epochs delivered."""

    num_tokens: int
    """Tokens in ready batches, without pads."""
    num_rows: int
    """Rows of those batches, with pads."""
    elapsed_s: float
    cpu_s: float
    """Time that the process had a core, all threads together."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens without pads."""
        return self.num_tokens / self.elapsed_s


def run_store_epoch(store: Store, *, seed: int, settings: StreamSettings, charge: Charge) -> Epoch:
    """Stream a store as the trainer does, in the order of its first epochs."""
    started_at, cpu_started_at = time.perf_counter(), time.process_time()
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
    return Epoch(
        num_tokens=num_tokens,
        num_rows=num_rows,
        elapsed_s=time.perf_counter() - started_at,
        cpu_s=time.process_time() - cpu_started_at,
    )


def run_peer_epoch(
    peer: Peer, states: StateSet, folder: Path, *, seed: int, num_threads: int, charge: Charge
) -> Epoch:
    """Read a peer's files in random order; threads make whole batches ahead of use."""
    started_at, cpu_started_at = time.perf_counter(), time.process_time()
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
    return Epoch(
        num_tokens=sum(int(states.lengths[batch].sum()) for batch in batches),
        num_rows=num_rows,
        elapsed_s=time.perf_counter() - started_at,
        cpu_s=time.process_time() - cpu_started_at,
    )


class ChargedStore(Store):
    """A store whose files are charged before they are read."""

    def __init__(self, store: Store, charge: Charge) -> None:
        super().__init__(store.root, store.manifest, store.finished_units)
        self._charge = charge

    def read_unit(self, unit: int, *, taps: Sequence[str] | None = None) -> Unit:
        self._charge_files(unit, [row_path(name, unit) for name in ROW_ARRAYS])
        return super().read_unit(unit, taps=taps)

    def copy_states(self, unit: int, tap: str, moves: Sequence[CopyRange]) -> None:
        is_lossy = self.manifest.settings["profile"] in STEPS
        self._charge_files(unit, state_paths([tap], unit, is_lossy=is_lossy))
        super().copy_states(unit, tap, moves)

    def _charge_files(self, unit: int, paths: Sequence[str]) -> None:
        files = self.receipt(unit).files
        self._charge(sum(files[path].bytes for path in paths))
