"""How fast one core turns a unit's files into states."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from carryon.cache.format.codec import decode_chunk, shard_index
from carryon.cache.format.quantization import STATE_TYPES
from carryon.cache.format.zarr_metadata import ITEM_BYTES, shard_path
from carryon.cache.store.reader import Store
from carryon.tools.compare.figure import Figure, Report, in_turn

TARGET = 1.5


def measure_decoding(name: str, root: Path, *, rounds: int, report: Report) -> None:
    """Read a unit of a store again and again, from memory, on one core.

    What counts is all of `read_unit`: files, checksums, decoding, tokens. Beside it the same by
    the core's own clock, which leaves out the time that other programs had the core, and decoding
    alone, from memory into memory that is there already.
    """
    store = Store.open(root, allow_unfinished=True)
    unit, manifest = min(store.finished_units), store.manifest
    dtype = STATE_TYPES[manifest.settings["dtype"]]
    tap_bytes = manifest.unit_tokens * store.width * ITEM_BYTES[dtype]
    unit_bytes = tap_bytes * len(store.taps)
    decode = _decoder(store, unit)

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
    report(
        Figure(
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
                "chunk_mb": manifest.rows_per_chunk * store.width * ITEM_BYTES[dtype] / 1e6,
            },
        )
    )


@contextmanager
def one_core() -> Iterator[None]:
    """Keep this thread, and threads that it starts, on one core; where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _decoder(store: Store, unit: int) -> Callable[[], None]:
    """Return what decodes a unit's first tap, of a shard in memory."""
    manifest, tap = store.manifest, store.taps[0]
    per_chunk = manifest.rows_per_chunk
    num_chunks = manifest.unit_tokens // per_chunk
    shard = memoryview((store.root / shard_path(tap, unit)).read_bytes())
    index = shard_index(shard, num_chunks=num_chunks, name=tap)
    dtype = STATE_TYPES[manifest.settings["dtype"]]
    out = np.zeros((manifest.unit_tokens, store.width), dtype=dtype)

    def decode() -> None:
        for number, (offset, size) in enumerate(index):
            rows = out[number * per_chunk : (number + 1) * per_chunk]
            decode_chunk(shard[offset : offset + size], rows, name=tap)

    return decode


def _seconds(work: Callable[[], None], clock: Callable[[], float]) -> float:
    started_at = clock()
    work()
    return max(clock() - started_at, 1e-9)  # some clocks are coarse
