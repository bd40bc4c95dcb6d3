"""Decoding speed of a unit on one core."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.job import Job, in_turn
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.states import SYNTHETIC, make_states
from carryon.tools.compare.figure import Figure

TARGET = 1.5


def measure_decoding(
    job: Job,
    *,
    width: int = 2560,
    taps: int = 4,
    mean_tokens: int = 588,
    max_tokens: int = 2048,
    unit_tokens: int = 8192,
    rounds: int = 12,
) -> None:
    """Report the speed of reading a unit: synthetic ones of each profile, and one of each store."""
    states = make_states(
        SYNTHETIC,
        num_samples=max(1, unit_tokens // mean_tokens),  # a unit, or a little more
        width=width,
        num_taps=taps,
        mean_tokens=mean_tokens,
        max_tokens=max_tokens,
        seed=0,
    )
    for profile in ("exact", "near", "compact"):
        settings = StoreSettings.from_dict(
            {"taps": states.taps, "profile": profile, "unit_tokens": unit_tokens}
        )
        root = job.work / profile
        write_scratch_store(root, states, settings=settings)
        suffix = "" if profile == "exact" else f".{profile}"
        job.add(_decode(f"{SYNTHETIC}{suffix}", root, rounds=rounds))
    for label, store in job.open_stores(("gsm", "python")).items():
        job.add(_decode(label, store.root, rounds=rounds))


def _decode(name: str, root: Path, *, rounds: int) -> Figure:
    """Read one unit repeatedly, from the page cache, on one core.

    The figure covers files, checksums, decoding and tokens. A detail is the same by CPU time, which
    excludes other processes.
    """
    store = Store.open(root, allow_unfinished=True)
    unit, manifest = min(store.finished_units), store.manifest
    row_bytes = store.width * manifest.states_dtype.itemsize
    unit_bytes = manifest.unit_tokens * row_bytes * len(store.taps)

    def read() -> None:
        store.read_unit(unit)

    with one_core():
        read()
        speeds = in_turn(
            {
                "read_unit": lambda: unit_bytes / _seconds(read, time.perf_counter) / 1e9,
                "read_unit_cpu": lambda: unit_bytes / _seconds(read, time.thread_time) / 1e9,
            },
            rounds=rounds,
        )
    is_exact = manifest.settings["profile"] == "exact"
    return Figure(
        figure=f"decode.{name}",
        value=speeds["read_unit"],
        unit="GB/s of raw",
        target=TARGET if is_exact else None,
        sense="at least",
        details={
            "gb_per_second": speeds,
            "profile": manifest.settings["profile"],
            "width": store.width,
            "taps": len(store.taps),
            "unit_mb": unit_bytes / 1e6,
            "chunk_mb": manifest.rows_per_chunk * row_bytes / 1e6,
        },
    )


@contextmanager
def one_core() -> Iterator[None]:
    """Pin this thread and its new threads to one core, where the system supports it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _seconds(work: Callable[[], None], clock: Callable[[], float]) -> float:
    started_at = clock()
    work()
    return max(clock() - started_at, 1e-9)  # some clocks are coarse
