"""Seconds to open a store and a carry-on after all checks, beside those of an earlier commit."""

import statistics
import subprocess
import sys
from pathlib import Path

from carryon.tools.bench.before import Source, sources
from carryon.tools.bench.job import Job
from carryon.tools.bench.open import make_large_store

BEFORE_CHECKS = "0d284f8"
"""The last commit whose carry-ons have no digests."""
_NEW, _OLD = range(2)
_STORE = ("carryon.cache.store.reader", "carryon.cache.reader")
_FOLDER = ("carryon.train.modules.serialization", "carryon.train.carryon_folder")
_MAKER = ("carryon.train.modules.bottleneck", "carryon.train.carryon")
_MAKE = ("build_bottleneck", "build_carryon")
_INNER = ("intermediate_size", "mlp_width")
_MAKE_CARRYON = """
import dataclasses, sys, torch
from {folder} import CarryOnCard, save_carryon
from {maker} import {make}
from carryon.train.config import CarryOnSettings
folder, width = sys.argv[1], int(sys.argv[2])
settings = CarryOnSettings(width=width, {inner}=2 * width)
module = {make}(settings, base_width=2048, seed=0)
facts = dict(base_width=2048, base=dict(id="base", width=2048), store_fingerprint="0" * 64)
card = CarryOnCard(settings=settings.to_dict(), split={{}}, alpha=1.0, figures={{}}, versions={{}},
    **facts)
save_carryon(folder, module, card, dtype=torch.bfloat16)
"""
_OPEN = """
import statistics, sys, time
from {module} import {name}
times = []
for _ in range({repeats}):
    started_at = time.perf_counter()
    {call}(sys.argv[1])
    times.append(time.perf_counter() - started_at)
print(statistics.median(times))
"""


def measure_opening(
    job: Job,
    *,
    units: int = 4000,
    samples: int = 2_000_000,
    widths: tuple[int, ...] = (96, 2048),
    rounds: int = 7,
) -> None:
    """Open a large store and carry-ons in fresh processes, this checkout and the commit in turn.

    Args:
        job: input.
        units: of the store.
        samples: of the store.
        widths: of the carry-ons: 1 MB and 140 MB with the defaults.
        rounds: processes of each; each opens several times and reports the median.
    """
    large = job.work / "store"
    make_large_store(large, num_units=units, num_samples=samples)
    with sources(BEFORE_CHECKS) as (old, new):
        _report(job, "store", {_NEW: (new, large), _OLD: (old, large)}, rounds=rounds)
        for width in widths:
            places = {}
            for number, source in ((_NEW, new), (_OLD, old)):
                folder = job.work / f"{number}-{width}"
                program = _MAKE_CARRYON.format(
                    folder=_FOLDER[number],
                    maker=_MAKER[number],
                    make=_MAKE[number],
                    inner=_INNER[number],
                )
                _run(source, program, str(folder), str(width))
                places[number] = (source, folder)
            size = (places[_NEW][1] / "carryon.safetensors").stat().st_size
            _report(job, f"carryon_{size / 1e6:.0f}_mb", places, rounds=rounds)


def _report(job: Job, what: str, places: dict[int, tuple[Source, Path]], *, rounds: int) -> None:
    seconds: dict[int, list[float]] = {_NEW: [], _OLD: []}
    for _ in range(rounds):
        for number, (source, folder) in places.items():
            is_store = what == "store"
            program = _OPEN.format(
                module=(_STORE if is_store else _FOLDER)[number],
                name="Store" if is_store else "load_carryon",
                call="Store.open" if is_store else "load_carryon",
                repeats=5,
            )
            seconds[number].append(float(_run(source, program, str(folder))))
    ours, theirs = (statistics.median(seconds[number]) for number in (_NEW, _OLD))
    job.report(f"trust.open.{what}.seconds", ours, "s", at_most=1.0)
    ratio = statistics.median(
        our / their for our, their in zip(seconds[_NEW], seconds[_OLD], strict=True)
    )
    job.report(
        f"trust.open.{what}.ratio",
        ratio,
        "of the seconds before",
        at_most=1.2,
        seconds=ours,
        seconds_before=theirs,
    )


def _run(source: Source, program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(
        command, env=source.environment(), stdout=subprocess.PIPE, check=True, text=True
    )
    return done.stdout.strip().rpartition("\n")[2]
