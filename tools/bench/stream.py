"""Streaming into ready batches, from our stores and from the layouts of other projects.

All layouts hold the same samples. Each is read as its own project reads it, in one process, in
turn in every round. Throughput counts tokens without padding.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from carryon.cache.settings import StoreSettings
from carryon.cache.store.decoded_cache import open_cache
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_reader import CopyRange
from carryon.tools.bench.disk import (
    Charge,
    SlowDisk,
    bring_into_memory,
    charge_nothing,
    flush,
    measure_folder,
)
from carryon.tools.bench.epoch import Epoch, run_peer_epoch, run_store_epoch
from carryon.tools.bench.job import Job, in_turn
from carryon.tools.bench.peers import Peer, list_peers
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.states import SYNTHETIC, StateSet, make_states, take_states
from carryon.tools.compare.figure import Figure
from carryon.train.config import StreamSettings

PROFILES = ("exact", "raw", "near", "compact")
DECODED = "decoded"
"""Layout of a store of the profile exact beside a decoded cache that a first epoch filled."""
WARM_TARGET = 1.0
RAW_TARGET = 1.05
DECODED_TARGET = 1.0
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
    write: Callable[[], dict[str, float] | None]
    """Writes them, and returns further details of the figure, if there are some."""
    run: Callable[[int, Charge], Epoch]
    """Reads one epoch with a number of threads."""


def measure_streaming(
    job: Job,
    *,
    samples: int = 96,
    width: int = 2560,
    taps: int = 4,
    mean_tokens: int = 588,
    max_tokens: int = 2048,
    unit_tokens: int = 8192,
    store_tokens: int = 262_144,
    threads: tuple[int, ...] = (1, 2),
    slow_mb_per_second: float = 300.0,
    rounds: int = 3,
) -> None:
    """Report the speed of every layout, on synthetic states and on those of each store.

    `work` is on the disk to measure; `store_tokens` limits what is streamed of a store.
    """
    peers = list_peers()
    synthetic = make_states(
        SYNTHETIC,
        num_samples=samples,
        width=width,
        num_taps=taps,
        mean_tokens=mean_tokens,
        max_tokens=max_tokens,
        seed=0,
    )
    sets = [(synthetic, unit_tokens)]
    for label, store in job.open_stores(("gsm", "python")).items():
        states = take_states(label, store, max_tokens=store_tokens)
        sets.append((states, store.manifest.unit_tokens))
    while sets:
        states, unit_tokens = sets.pop(0)  # frees each set after use
        for figure in stream_layouts(
            states,
            peers,
            job.work / states.name,
            unit_tokens=unit_tokens,
            rounds=rounds,
            threads=threads,
            slow_mb_per_second=slow_mb_per_second,
        ):
            job.add(figure)


def stream_layouts(
    states: StateSet,
    peers: Sequence[Peer],
    work: Path,
    *,
    unit_tokens: int,
    rounds: int,
    threads: Sequence[int],
    slow_mb_per_second: float,
) -> list[Figure]:
    """Write all layouts below `work`, stream them and remove them; see `measure_streaming`.

    Returns:
        A figure for each layout, then four against the best peer.
    """
    layouts = [
        *(_our_layout(states, work, profile, unit_tokens) for profile in PROFILES),
        _our_layout(states, work, "exact", unit_tokens, name=DECODED),
        *(_peer_layout(states, work, peer) for peer in peers),
    ]
    written = {layout.name: _write(layout, states) for layout in layouts}
    disk = SlowDisk(slow_mb_per_second * 1e6)
    warm = _best_speeds(layouts, threads, charge_nothing, rounds=rounds)
    # One round with the most threads: the disk dominates, equally for all layouts.
    slow = _best_speeds(layouts, [max(threads)], disk.charge, rounds=1)
    figures = [
        Figure(
            figure=f"stream.{states.name}.{layout.name}",
            value=warm[layout.name].tokens_per_second,
            unit="tokens/s",
            sense="at least",
            details={
                **written[layout.name],
                "role": layout.role,
                "warm_tokens_per_second": warm[layout.name].tokens_per_second,
                "slow_disk_tokens_per_second": slow[layout.name].tokens_per_second,
                "threads": warm[layout.name].threads,
                "slow_disk_threads": slow[layout.name].threads,
                "tokens_per_cpu_second": warm[layout.name].tokens_per_cpu_second,
                "padded_ratio": warm[layout.name].padded_ratio,
                "read_as": layout.read_as,
            },
        )
        for layout in layouts
    ]
    for layout in layouts:
        shutil.rmtree(layout.folder)
    speeds = {figure.figure.rpartition(".")[2]: figure.details for figure in figures}
    slow_details = {"mb_per_second": slow_mb_per_second}
    return [
        *figures,
        _against_best_peer(states, speeds, "warm", WARM_TARGET, {}),
        _against_best_peer(states, speeds, "warm", RAW_TARGET, {}, ours="raw"),
        _against_best_peer(states, speeds, "warm", DECODED_TARGET, {}, ours=DECODED),
        _against_best_peer(states, speeds, "slow_disk", SLOW_TARGET, slow_details),
    ]


def _against_best_peer(
    states: StateSet,
    speeds: dict[str, dict[str, Any]],
    name: str,
    target: float,
    details: dict[str, Any],
    *,
    ours: str = "exact",
) -> Figure:
    of = {layout: float(each[f"{name}_tokens_per_second"]) for layout, each in speeds.items()}
    by_role = {
        role: [layout for layout, each in speeds.items() if each["role"] == role]
        for role in ("ours", "peer", "limit")
    }
    best = max(by_role["peer"], key=lambda layout: of[layout])
    return Figure(
        figure=f"stream.{states.name}.{name}" + f"_{ours}" * (ours != "exact"),
        value=of[ours] / of[best],
        unit="x best peer",
        target=target,
        sense="at least",
        details={
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
            **details,
        },
    )


def _our_layout(
    states: StateSet, work: Path, profile: str, unit_tokens: int, *, name: str = ""
) -> Layout:
    """Return a store of a profile; with a name of its own, read through a decoded cache."""
    folder = work / f"store-{name or profile}"
    settings = StoreSettings.from_dict(
        {"taps": states.taps, "profile": profile, "unit_tokens": unit_tokens}
    )

    decoded_gb = 1 + 2 * states.raw_bytes / 1e9

    def write() -> dict[str, float]:
        write_scratch_store(folder / "store", states, settings=settings)
        if not name:
            return {}
        speeds = {"filling_tokens_per_second": _read_once(store())}
        store.cache_clear()  # as a new run, which compares each file once
        return speeds | {"comparing_tokens_per_second": _read_once(store())}

    @cache
    def store() -> Store:  # opened once, as in a run of many epochs
        decoded = open_cache(str(folder / "decoded") if name else "", max_gb=decoded_gb)
        return Store.open(folder / "store", decoded=decoded)

    def run(num_threads: int, charge: Charge) -> Epoch:
        stream = StreamSettings(reader_threads=num_threads)
        return run_store_epoch(store(), seed=_SEED, settings=stream, charge=charge)

    through = ", from a decoded cache after its first epoch" * bool(name)
    return Layout(
        name=name or profile,
        role="ours",
        read_as="the trainer's stream: units in random order, packed batches of random samples"
        + through,
        folder=folder,
        write=write,
        run=run,
    )


def _read_once(store: Store) -> float:
    """Return the tokens/s of reading all units once, in their order, in one thread."""
    rows = np.empty((store.unit_tokens, store.width), dtype=store.states_dtype)
    started_at = time.perf_counter()
    for unit in range(store.num_units):
        num_tokens = store.receipt(unit).num_tokens
        for tap in store.taps:
            move = CopyRange(first=0, stop=num_tokens, to=rows[:num_tokens])
            store.copy_states(unit, tap, [move])
    return store.num_tokens / (time.perf_counter() - started_at)


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
        write=partial(peer.write, states, folder),
        run=run,
    )


def _write(layout: Layout, states: StateSet) -> dict[str, Any]:
    """Write a layout and flush it to the disk; return its size and write speed."""
    layout.folder.mkdir(parents=True)
    started_at = time.perf_counter()
    details = layout.write() or {}
    flush(layout.folder)
    elapsed_s = time.perf_counter() - started_at
    num_files, num_bytes = measure_folder(layout.folder)
    return {
        "files": num_files,
        "bytes_per_token": num_bytes / states.num_tokens,
        "ratio_to_raw": num_bytes / states.raw_bytes,
        "write_mb_per_second": states.raw_bytes / elapsed_s / 1e6,
        **details,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Speed:
    """The best of a layout's numbers of threads."""

    tokens_per_second: float
    threads: int
    tokens_per_cpu_second: float
    """By CPU time, which excludes other processes."""
    padded_ratio: float
    """Padding as a part of all batch rows."""


def _best_speeds(
    layouts: Sequence[Layout], threads: Sequence[int], charge: Charge, *, rounds: int
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
        for num_threads in threads
    }
    medians = in_turn(ways, rounds=rounds)
    best = {}
    for layout in layouts:
        speed, count = max((medians[f"{layout.name}/{count}"], count) for count in threads)
        runs = epochs[layout.name, count]
        best[layout.name] = _Speed(
            tokens_per_second=speed,
            threads=count,
            tokens_per_cpu_second=statistics.median(run.num_tokens / run.cpu_s for run in runs),
            padded_ratio=1 - runs[0].num_tokens / runs[0].num_rows,
        )
    return best
