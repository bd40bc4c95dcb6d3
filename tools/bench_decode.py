"""How fast one core turns a unit's files into states."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from carryon.cache.chunk import decode_shard
from carryon.cache.layout import shard_path
from carryon.cache.precision import STATE_TYPES
from carryon.cache.reader import Store
from carryon.tools.bench_figure import Figure, Report, in_turn

TARGET = 1.5


def measure_decoding(name: str, root: Path, *, rounds: int, report: Report) -> None:
    """Read the first unit of a store again and again, from memory, on one core.

    Two figures: all of `read_unit` (files, checksums, decoding, tokens), which has the target,
    and decoding alone into memory that is there already.
    """
    store = Store.open(root, allow_unfinished=True)
    unit, tap = min(store.finished_units), store.taps[0]
    raw_bytes = store.manifest.unit_tokens * store.width * _item_bytes(store) * len(store.taps)

    def read() -> None:
        store.read_unit(unit)

    stored = np.fromfile(root / shard_path(tap, unit), dtype=np.uint8)
    dtype = STATE_TYPES[store.manifest.settings["dtype"]]
    out = np.zeros((store.manifest.unit_tokens, store.width), dtype=dtype)
    per_chunk = store.manifest.rows_per_chunk

    def decode() -> None:
        decode_shard(
            stored.data,
            out,
            rows_per_chunk=per_chunk,
            num_chunks=store.manifest.unit_tokens // per_chunk,
            first_chunk=0,
            name=name,
        )

    with one_core():
        read()
        speeds = in_turn(
            {
                "read_unit": lambda: raw_bytes / _seconds(read) / 1e9,
                "decode": lambda: raw_bytes / len(store.taps) / _seconds(decode) / 1e9,
            },
            rounds=rounds,
        )
    details: dict[str, Any] = {
        "profile": store.manifest.settings["profile"],
        "width": store.width,
        "taps": len(store.taps),
        "unit_mb": raw_bytes / 1e6,
        "chunk_mb": per_chunk * store.width * _item_bytes(store) / 1e6,
    }
    report(
        Figure(
            figure=f"decode.{name}",
            value=speeds["read_unit"],
            unit="GB/s of raw",
            target=TARGET if details["profile"] == "exact" else None,
            sense="at least",
            details={**details, "decode_alone_gb_per_second": speeds["decode"]},
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


def _seconds(work: Callable[[], None]) -> float:
    started_at = time.perf_counter()
    work()
    return time.perf_counter() - started_at


def _item_bytes(store: Store) -> int:
    return np.dtype(STATE_TYPES[store.manifest.settings["dtype"]]).itemsize
