"""Streaming into ready batches, from our stores and from the layouts of other projects.

All layouts hold the same samples; each is read as its own project reads it, in one process, one
after another in every round. What counts is tokens without pads.
"""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.disk import (
    Charge,
    SlowDisk,
    bring_into_memory,
    charge_nothing,
    drop_from_memory,
    measure_folder,
)
from carryon.tools.bench.epoch import Epoch, run_peer_epoch, run_store_epoch
from carryon.tools.bench.peer import Peer
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.states import StateSet
from carryon.tools.compare.figure import Figure, Report, in_turn
from carryon.train.config import StreamSettings

PROFILES = ("exact", "near", "compact")
WARM_TARGET = 1.0
SLOW_TARGET = 1.4
_SEED = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Samples on disk, and how an epoch of them is read."""

    name: str
    role: str
    """`ours`, `peer` or `limit`."""
    read_as: str
    folder: Path
    write: Callable[[], None]
    run: Callable[[int, Charge], Epoch]
    """Reads one epoch with so many threads."""


def measure_streaming(
    states: StateSet,
    peers: Sequence[Peer],
    work: Path,
    *,
    unit_tokens: int,
    rounds: int,
    thread_counts: Sequence[int],
    slow_mb_per_second: float,
    report: Report,
) -> list[Figure]:
    """Write all layouts below `work`, stream them, remove them.

    Args:
        states: the samples.
        peers: other projects' layouts.
        work: folder; on the disk that is to be measured.
        unit_tokens: rows of a unit of our stores.
        rounds: epochs that each median is taken of.
        thread_counts: reader threads that each layout is tried with; the best of them counts.
        slow_mb_per_second: speed of the slow disk.
        report: called with each figure.

    Returns:
        One figure a layout.
    """
    layouts = [
        *(_our_layout(states, work, profile, unit_tokens) for profile in PROFILES),
        *(_peer_layout(states, work, peer) for peer in peers),
    ]
    written = {layout.name: _write(layout, states) for layout in layouts}
    disk = SlowDisk(slow_mb_per_second * 1e6)
    warm = _best_speeds(layouts, thread_counts, charge_nothing, rounds=rounds)
    # One round with most threads: the disk decides, and it is the same for all.
    slow = _best_speeds(layouts, [max(thread_counts)], disk.charge, rounds=1)
    cold = {layout.name: _cold_speed(layout, warm[layout.name].threads) for layout in layouts}
    figures = []
    for layout in layouts:
        found = warm[layout.name]
        figures.append(
            Figure(
                figure=f"stream.{states.name}.{layout.name}",
                value=found.tokens_per_second,
                unit="tokens/s",
                sense="at least",
                details={
                    **written[layout.name],
                    "role": layout.role,
                    "warm_tokens_per_second": found.tokens_per_second,
                    "cold_tokens_per_second": cold[layout.name],
                    "slow_disk_tokens_per_second": slow[layout.name].tokens_per_second,
                    "threads": found.threads,
                    "slow_disk_threads": slow[layout.name].threads,
                    "tokens_per_cpu_second": found.tokens_per_cpu_second,
                    "padded_ratio": found.padded_ratio,
                    "read_as": layout.read_as,
                },
            )
        )
        report(figures[-1])
    for name, target, column in (
        ("warm", WARM_TARGET, "warm_tokens_per_second"),
        ("slow_disk", SLOW_TARGET, "slow_disk_tokens_per_second"),
    ):
        report(_against_best_peer(states, figures, name, target, column, slow_mb_per_second))
    for layout in layouts:
        shutil.rmtree(layout.folder)
    return figures


def _against_best_peer(
    states: StateSet,
    figures: Sequence[Figure],
    name: str,
    target: float,
    column: str,
    slow_mb_per_second: float,
) -> Figure:
    speeds = {figure.figure.rpartition(".")[2]: figure.details for figure in figures}
    of = {layout: float(details[column]) for layout, details in speeds.items()}
    by_role = {
        role: [layout for layout, details in speeds.items() if details["role"] == role]
        for role in ("ours", "peer", "limit")
    }
    best = max(by_role["peer"], key=lambda layout: of[layout])
    details: dict[str, Any] = {
        "best_peer": best,
        "ratios": {layout: of[layout] / of[best] for layout in by_role["ours"]},
        "to_limit": {
            limit: {layout: of[layout] / of[limit] for layout in by_role["ours"]}
            for limit in by_role["limit"]
        },
        "width": states.width,
        "taps": len(states.taps),
        "samples": len(states.lengths),
        "tokens": states.num_tokens,
    }
    if name == "slow_disk":
        details["mb_per_second"] = slow_mb_per_second
    return Figure(
        figure=f"stream.{states.name}.{name}",
        value=of["exact"] / of[best],
        unit="x best peer",
        target=target,
        sense="at least",
        details=details,
    )


def _our_layout(states: StateSet, work: Path, profile: str, unit_tokens: int) -> Layout:
    folder = work / f"store-{profile}"
    settings = StoreSettings.from_dict(
        {"taps": states.taps, "profile": profile, "unit_tokens": unit_tokens}
    )

    def write() -> None:
        write_scratch_store(folder, states, settings=settings)

    @cache
    def store() -> Store:
        return Store.open(folder)  # once, as a run of many epochs does

    def run(num_threads: int, charge: Charge) -> Epoch:
        stream = StreamSettings(reader_threads=num_threads)
        return run_store_epoch(store(), seed=_SEED, settings=stream, charge=charge)

    return Layout(
        name=profile,
        role="ours",
        read_as="the trainer's stream: units in random order, packed batches of random samples",
        folder=folder,
        write=write,
        run=run,
    )


def _peer_layout(states: StateSet, work: Path, peer: Peer) -> Layout:
    folder = work / peer.name

    def run(num_threads: int, charge: Charge) -> Epoch:
        return run_peer_epoch(
            peer, states, folder, seed=_SEED, num_threads=num_threads, charge=charge
        )

    return Layout(
        name=peer.name,
        role="limit" if peer.is_limit else "peer",
        read_as=peer.read_as,
        folder=folder,
        write=lambda: peer.write(states, folder),
        run=run,
    )


def _write(layout: Layout, states: StateSet) -> dict[str, Any]:
    """Write a layout until it is on the disk; return its size and the speed."""
    layout.folder.mkdir(parents=True)
    os.sync()  # what others left to be written
    started_at = time.perf_counter()
    layout.write()
    os.sync()
    elapsed_s = time.perf_counter() - started_at
    num_files, num_bytes = measure_folder(layout.folder)
    return {
        "files": num_files,
        "bytes_per_token": num_bytes / states.num_tokens,
        "ratio_to_raw": num_bytes / states.raw_bytes,
        "write_mb_per_second": states.raw_bytes / elapsed_s / 1e6,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Speed:
    """The best of a layout's numbers of threads."""

    tokens_per_second: float
    threads: int
    tokens_per_cpu_second: float
    """By the process' own clock, which leaves out the time that other programs had the cores."""
    padded_ratio: float
    """Part of all batch rows that are pads."""


def _best_speeds(
    layouts: Sequence[Layout], thread_counts: Sequence[int], charge: Charge, *, rounds: int
) -> dict[str, _Speed]:
    """Stream every layout with every number of threads in turn; medians of rounds."""
    epochs: dict[tuple[str, int], list[Epoch]] = {}

    def run(layout: Layout, num_threads: int) -> float:
        bring_into_memory(layout.folder)
        epoch = layout.run(num_threads, charge)
        epochs.setdefault((layout.name, num_threads), []).append(epoch)
        return epoch.tokens_per_second

    ways = {
        f"{layout.name}/{num_threads}": partial(run, layout, num_threads)
        for layout in layouts
        for num_threads in thread_counts
    }
    medians = in_turn(ways, rounds=rounds)
    best = {}
    for layout in layouts:
        speed, threads = max((medians[f"{layout.name}/{count}"], count) for count in thread_counts)
        found = epochs[layout.name, threads]
        best[layout.name] = _Speed(
            tokens_per_second=speed,
            threads=threads,
            tokens_per_cpu_second=statistics.median(one.num_tokens / one.cpu_s for one in found),
            padded_ratio=1 - found[0].num_tokens / found[0].num_rows,
        )
    return best


def _cold_speed(layout: Layout, num_threads: int) -> float | None:
    if not drop_from_memory(layout.folder):
        return None
    return layout.run(num_threads, charge_nothing).tokens_per_second
