"""Training from a store of very many units: tokens/s, memory, time to the first batch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from carryon.tools.bench.job import Job, in_turn, median_of, run_fresh
from carryon.tools.bench.open import make_large_store
from carryon.train.config import OptimizationSettings, TrainSettings
from carryon.train.data.datasets import TrainData, open_data
from carryon.train.data.joint_sampler import join_orders
from carryon.train.data.loader import Stream
from carryon.train.data.sampler import count_steps

TIMES_AS_MANY = 100
SPEED_TARGET = 0.97
MEMORY_TARGET_MB = 100.0
"""Room for the sample tables of 100 times as many samples, without hidden states."""
RESUME_TARGET_S = 1.0
RESUME_AT = 0.9
_SAMPLES_PER_UNIT = 100
_STREAM = """
import json, sys
import psutil
from carryon.tools.bench.many_units import stream_tokens
resident = psutil.Process().memory_info
run = stream_tokens(sys.argv[1], int(sys.argv[2]), resident_bytes=lambda: resident().rss)
print(json.dumps(run))
"""


def measure_units(job: Job, *, units: int = 20, tokens: int = 400_000, rounds: int = 5) -> None:
    """Report speed and memory of streaming from a store with 100 times as many `units`."""
    folders = _make_stores(job, units, (1, TIMES_AS_MANY))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in folders}

    def stream(name: str) -> float:
        runs[name].append(run_fresh(_STREAM, str(folders[name]), str(tokens)))
        return runs[name][-1]["tokens_per_second"]

    speeds = in_turn({name: partial(stream, name) for name in folders}, rounds=rounds)
    median = {name: median_of(each) for name, each in runs.items()}
    memory = {name: run["peak_mb"] for name, run in median.items()}
    few, many = folders
    details: dict[str, Any] = {
        "units": {name: units * int(name) for name in folders},
        "tokens_per_second": speeds,
        "tokens": {name: run["tokens"] for name, run in median.items()},
        "planned_s": {name: run["planned_s"] for name, run in median.items()},
        "peak_mb": memory,
    }
    speed = speeds[many] / speeds[few]
    job.report("units.speed", speed, "of the small store's", at_least=SPEED_TARGET, **details)
    more = memory[many] - memory[few]
    job.report("units.memory", more, "MB more", at_most=MEMORY_TARGET_MB, **details)


def measure_resume(job: Job, *, units: int = 20, rounds: int = 5) -> None:
    """Report how much later the first batch arrives at 90 % of an epoch than at its start."""
    [folder] = _make_stores(job, units, (TIMES_AS_MANY,)).values()

    ways = {
        "fresh": partial(first_batch, folder, at=0.0),
        "resumed": partial(first_batch, folder, at=RESUME_AT),
    }
    seconds = in_turn(ways, rounds=rounds)
    job.report(
        "resume.first_batch",
        seconds["resumed"] - seconds["fresh"],
        "s more than a fresh start",
        at_most=RESUME_TARGET_S,
        seconds=seconds,
        at=RESUME_AT,
    )


def first_batch(folder: Path, *, at: float, taps: Sequence[str] = ("final",)) -> float:
    """Return the seconds from opening a store to the first batch behind a part of an epoch."""
    started_at = time.perf_counter()
    data, optimization = _open(str(folder))
    windows = [window for epoch in data.plan(optimization) for window in epoch]
    done = int(at * count_steps(windows))
    order = join_orders([windows], [done], rank=0, world_size=1)
    with Stream(
        data.store, order.windows, taps=taps, settings=data.settings, is_pinned=False
    ) as steps:
        next(iter(steps))
        return time.perf_counter() - started_at


def stream_tokens(
    folder: str, num_tokens: int, *, resident_bytes: Callable[[], int]
) -> dict[str, float]:
    """Stream `num_tokens` of a store over several epochs, as the trainer does."""
    before = resident_bytes()
    data, optimization = _open(folder)
    one = int(data.store.sample_lengths[data.split.train].sum())
    epochs = replace(optimization, epochs=-(-num_tokens // one))
    started_at = time.perf_counter()
    windows = [window for epoch in data.plan(epochs) for window in epoch]
    planned_s = time.perf_counter() - started_at
    seen, peak = 0, before
    started_at = time.perf_counter()
    with Stream(
        data.store, windows, taps=["final"], settings=data.settings, is_pinned=False
    ) as steps:
        for batches in steps:
            seen += sum(batch.num_tokens for batch in batches)
            peak = max(peak, resident_bytes())
            if seen >= num_tokens:
                break
    elapsed_s = time.perf_counter() - started_at
    return {
        "tokens_per_second": seen / elapsed_s,
        "tokens": seen,
        "planned_s": planned_s,
        "peak_mb": (peak - before) / 1e6,
    }


def _open(folder: str) -> tuple[TrainData, OptimizationSettings]:
    return open_data([folder], TrainSettings()), OptimizationSettings(epochs=1)


def _make_stores(job: Job, units: int, times: tuple[int, ...]) -> dict[str, Path]:
    """Write stores of several multiples of `units` and return their folders."""
    folders = {str(factor): job.work / f"store-{factor}" for factor in times}
    for factor, folder in folders.items():
        num_units = units * int(factor)
        make_large_store(folder, num_units=num_units, num_samples=num_units * _SAMPLES_PER_UNIT)
    return folders
