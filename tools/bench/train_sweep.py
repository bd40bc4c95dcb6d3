"""What a sweep reads and takes, beside as many runs one after another, on a slow disk."""

import time
from collections.abc import Sequence
from pathlib import Path

from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.disk import SlowDisk
from carryon.tools.bench.epoch import ChargedStore
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.states import make_states
from carryon.tools.bench.train import TrainJob
from carryon.tools.compare.figure import Figure
from carryon.train.config import (
    CarryOnSettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
    TrainSettings,
)
from carryon.train.trainer.trainer import Job, train_jointly

BYTES_TARGET = 1.0
WALL_TARGET = 0.35


def measure_sweep(job: TrainJob) -> None:
    """Train the same runs side by side and one after another, from a store on a slow disk."""
    sizes = job.sizes
    states = make_states(
        "sweep",
        num_samples=sizes.sweep_samples,
        width=sizes.sweep_width,
        num_taps=sizes.sweep_taps,
        mean_tokens=300,
        max_tokens=1024,
        seed=0,
    )
    root = job.work / "store"
    settings = StoreSettings(taps=states.taps, unit_tokens=2048)
    write_scratch_store(root, states, settings=settings)
    rates = [1e-3 * (number + 1) for number in range(sizes.sweep_runs)]
    runs = [_settings(rate, states.taps) for rate in rates]
    together = _Measured(sizes.sweep_mb_per_second)
    together.train(root, job.work / "together", runs)
    alone = [_Measured(sizes.sweep_mb_per_second) for _ in runs]
    for number, (measured, run) in enumerate(zip(alone, runs, strict=True)):
        measured.train(root, job.work / f"alone-{number}", [run])
    alone_s = sum(measured.elapsed_s for measured in alone)
    details = {
        "runs": len(runs),
        "mb_per_second": sizes.sweep_mb_per_second,
        "sweep_s": together.elapsed_s,
        "separate_s": alone_s,
        "sweep_mb": together.num_bytes / 1e6,
        "one_run_mb": alone[0].num_bytes / 1e6,
    }
    job.report(
        Figure(
            figure="sweep.bytes",
            value=together.num_bytes / alone[0].num_bytes,
            unit="of one run's",
            target=BYTES_TARGET,
            details=details,
        )
    )
    job.report(
        Figure(
            figure="sweep.wall",
            value=together.elapsed_s / alone_s,
            unit="of separate runs'",
            target=WALL_TARGET,
            details=details,
        )
    )


class _Measured:
    """Bytes and seconds of runs that read from a slow disk."""

    def __init__(self, mb_per_second: int) -> None:
        self.num_bytes = 0
        self.elapsed_s = 0.0
        self._disk = SlowDisk(mb_per_second * 1e6)

    def train(self, store: Path, out: Path, runs: Sequence[TrainSettings]) -> None:
        started_at = time.perf_counter()
        jobs = [Job(out=str(out / str(number)), settings=run) for number, run in enumerate(runs)]
        train_jointly([str(store)], jobs, wrap_store=self._behind)
        self.elapsed_s = time.perf_counter() - started_at

    def _behind(self, store: Store) -> Store:
        return ChargedStore(store, self._charge)

    def _charge(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._disk.charge(num_bytes)


def _settings(learning_rate: float, taps: list[str]) -> TrainSettings:
    return TrainSettings(
        carryon=CarryOnSettings(taps=taps),
        optimization=OptimizationSettings(learning_rate=learning_rate, epochs=1),
        stream=StreamSettings(window_units=2),
        run=RunSettings(checkpoint_every=0),
    )
