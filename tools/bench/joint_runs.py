"""Bytes and time of a sweep against the same runs one after another, on a slow disk."""

import time
from collections.abc import Sequence
from pathlib import Path

from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.view import StoreLike
from carryon.tools.bench.disk import SlowDisk
from carryon.tools.bench.epoch import ChargedStore
from carryon.tools.bench.job import Job
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.states import make_states
from carryon.train.config import TrainSettings
from carryon.train.trainer.run import Job as TrainJob
from carryon.train.trainer.trainer import train_jointly

BYTES_TARGET = 1.0
WALL_TARGET = 0.35


def measure_sweep(
    job: Job,
    *,
    runs: int = 8,
    samples: int = 60,
    width: int = 2560,
    taps: int = 4,
    mb_per_second: float = 30.0,
) -> None:
    """Report bytes and time of a sweep against its runs one after another."""
    states = make_states(
        "sweep",
        num_samples=samples,
        width=width,
        num_taps=taps,
        mean_tokens=300,
        max_tokens=1024,
        seed=0,
    )
    root = job.work / "store"
    write_scratch_store(root, states, settings=StoreSettings(taps=states.taps, unit_tokens=2048))
    settings = TrainSettings.from_options(
        taps=states.taps, epochs=1, window_units=2, checkpoint_every=0
    )
    chosen = [settings.with_options(learning_rate=1e-3 * (1 + number)) for number in range(runs)]
    together = _Measured(mb_per_second)
    together.train(root, job.work / "together", chosen)
    alone = [_Measured(mb_per_second) for _ in chosen]
    for number, (measured, run) in enumerate(zip(alone, chosen, strict=True)):
        measured.train(root, job.work / f"alone-{number}", [run])
    alone_s = sum(measured.elapsed_s for measured in alone)
    details = {
        "runs": runs,
        "mb_per_second": mb_per_second,
        "sweep_s": together.elapsed_s,
        "separate_s": alone_s,
        "sweep_mb": together.num_bytes / 1e6,
        "one_run_mb": alone[0].num_bytes / 1e6,
    }
    job.report(
        "sweep.bytes",
        together.num_bytes / alone[0].num_bytes,
        "of one run's",
        at_most=BYTES_TARGET,
        **details,
    )
    job.report(
        "sweep.wall",
        together.elapsed_s / alone_s,
        "of separate runs'",
        at_most=WALL_TARGET,
        **details,
    )


class _Measured:
    """Bytes and seconds of runs that read from a slow disk."""

    def __init__(self, mb_per_second: float) -> None:
        self.num_bytes = 0
        self.elapsed_s = 0.0
        self._disk = SlowDisk(mb_per_second * 1e6)

    def train(self, store: Path, out: Path, runs: Sequence[TrainSettings]) -> None:
        started_at = time.perf_counter()
        jobs = [
            TrainJob(out=str(out / str(number)), settings=run) for number, run in enumerate(runs)
        ]
        train_jointly([str(store)], jobs, wrap_store=self._charged)
        self.elapsed_s = time.perf_counter() - started_at

    def _charged(self, store: StoreLike) -> StoreLike:
        assert isinstance(store, Store)
        return ChargedStore(store, self._charge)

    def _charge(self, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        self._disk.charge(num_bytes)
