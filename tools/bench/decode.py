"""Decoding speed of a unit on one core."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from carryon.cache.format.codec import decode_chunk, shard_index
from carryon.cache.format.zarr_metadata import shard_path
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
    """Report the speed of reading a unit: of synthetic states in each profile, and of each store.

    Args:
        job: input.
        width: channels of the synthetic states.
        taps: taps of the synthetic states.
        mean_tokens: mean length of synthetic samples.
        max_tokens: longest synthetic sample.
        unit_tokens: rows of a synthetic unit.
        rounds: reads per median.
    """
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

    The figure is the speed of `read_unit`: files, checksums, decoding, tokens. The details add CPU
    time, which excludes other processes, and decoding alone from memory into memory.
    """
    store = Store.open(root, allow_unfinished=True)
    unit, manifest = min(store.finished_units), store.manifest
    row_bytes = store.width * manifest.states_dtype.itemsize
    tap_bytes = manifest.unit_tokens * row_bytes
    unit_bytes = tap_bytes * len(store.taps)
    decode = _first_tap_decoder(store, unit)

    def read() -> None:
        store.read_unit(unit)

    with one_core():
        read()
        speeds = in_turn(
            {
                "read_unit": lambda: unit_bytes / _seconds(read, time.perf_counter) / 1e9,
                "read_unit_cpu": lambda: unit_bytes / _seconds(read, time.thread_time) / 1e9,
                "decode_alone": lambda: tap_bytes / _seconds(decode, time.perf_counter) / 1e9,
                "decode_alone_cpu": lambda: tap_bytes / _seconds(decode, time.thread_time) / 1e9,
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


def _first_tap_decoder(store: Store, unit: int) -> Callable[[], None]:
    """Return a function that decodes a unit's first tap from a shard in memory."""
    manifest, tap = store.manifest, store.taps[0]
    per_chunk = manifest.rows_per_chunk
    num_chunks = manifest.unit_tokens // per_chunk
    shard = memoryview((store.root / shard_path(tap, unit)).read_bytes())
    index = shard_index(shard, num_chunks=num_chunks, name=tap)
    out = np.zeros((manifest.unit_tokens, store.width), dtype=manifest.states_dtype)

    def decode() -> None:
        for number, (offset, size) in enumerate(index):
            rows = out[number * per_chunk : (number + 1) * per_chunk]
            decode_chunk(shard[offset : offset + size], rows, name=tap)

    return decode


def _seconds(work: Callable[[], None], clock: Callable[[], float]) -> float:
    started_at = clock()
    work()
    return max(clock() - started_at, 1e-9)  # some clocks are coarse
