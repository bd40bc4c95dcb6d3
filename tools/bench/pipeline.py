"""The pipeline of an extraction with a base that costs nothing: all but the forward passes.

The states are in memory; the base hands out parts of them. They go through the code that every
extraction runs: batches read ahead, rows gathered, chunks encoded, digests, files, receipts.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from carryon.cache.extraction.forward import run_units, units_to_do
from carryon.cache.extraction.sharing.claims import Claims
from carryon.cache.extraction.sharing.leases import Leases
from carryon.cache.format.codec import encode_chunk
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.receipt import units_with_receipt
from carryon.cache.lock import write_lock
from carryon.cache.settings import StoreSettings
from carryon.tools.bench.job import Job
from carryon.tools.bench.made_base import costless_base
from carryon.tools.bench.scratch import plan_scratch
from carryon.tools.bench.states import StateSet, make_states

SPEED_TARGET = 0.6
SCALING_TARGET = 1.7
_MEMORY = Path("/dev/shm")
_PROGRAM = (
    "import json, os, sys; job = json.loads(sys.argv[1]); os.sched_setaffinity(0, job['cores']);"
    "os.environ['OMP_NUM_THREADS'] = '1';"
    "from carryon.tools.bench.pipeline import run_alone;"
    "print(json.dumps(run_alone(job)), flush=True)"
)


def measure_pipeline(
    job: Job,
    *,
    tokens: int = 786_432,
    width: int = 1024,
    unit_tokens: int = 32_768,
    batch_tokens: int = 16_384,
    mean_tokens: int = 256,
    profiles: tuple[str, ...] = ("exact", "raw"),
    rounds: int = 3,
) -> None:
    """Report GB/s of raw states on one core, for each profile, and with two cores.

    Two cores are one process whose pool has both, and two processes that claim units (`--workers`)
    with a core each. Files are in memory where there is a file system for it: the disk is not the
    pipeline's.
    """
    samples = make_states(
        "pipeline",
        num_samples=max(1, tokens // mean_tokens),
        width=1,
        num_taps=1,
        mean_tokens=mean_tokens,
        max_tokens=min(2048, unit_tokens),
        seed=0,
    )
    cores = sorted(os.sched_getaffinity(0))[-2:]
    ways: dict[str, list[list[int]]] = {"one core": [[cores[-1]]]}
    if len(cores) > 1:
        ways |= {"two cores": [cores], "two workers": [[core] for core in cores]}
    with fast_folder(job, 4 * samples.num_tokens * width) as folder:
        for profile in profiles:
            planned = folder / profile
            _plan(planned, samples, width=width, unit_tokens=unit_tokens, profile=profile)
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
            for number in range(rounds):
                for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
                    root = Path(shutil.copytree(planned, folder / "store"))
                    runs[name].append(_run(root, ways[name], batch_tokens=batch_tokens))
                    shutil.rmtree(root)
            _report(job, profile, runs, folder=folder, width=width, unit_tokens=unit_tokens)


def _report(
    job: Job, profile: str, runs: dict[str, list[dict[str, Any]]], *, folder: Path, **sizes: int
) -> None:
    name = "pipeline" if profile == "exact" else "pipeline.raw"
    speed = {way: statistics.median(run["gb_per_second"] for run in runs[way]) for way in runs}
    details: dict[str, Any] = {"folder": str(folder.parent), "profile": profile, **sizes}
    alone = runs["one core"]
    job.report(
        f"{name}.speed",
        speed["one core"],
        "GB/s of raw states on one core",
        at_least=SPEED_TARGET,
        of_codec=speed["one core"] / statistics.median(run["codec"] for run in alone),
        codec_gb_per_second=statistics.median(run["codec"] for run in alone),
        runs=alone,
        **details,
    )
    for way, text in (("two cores", "pool"), ("two workers", "workers")):
        if way in speed:
            job.report(
                f"{name}.{text}",
                speed[way] / speed["one core"],
                f"x one core, {way}",
                at_least=SCALING_TARGET,
                gb_per_second=speed[way],
                runs=runs[way],
                **details,
            )


def _plan(root: Path, states: StateSet, *, width: int, unit_tokens: int, profile: str) -> None:
    bits = np.full((4, width), 0x3F80, dtype=np.uint16)  # ones: the probe is not looked at
    settings = StoreSettings.from_dict(
        {"taps": ["final"], "unit_tokens": unit_tokens, "profile": profile}
    )
    plan_scratch(root, states.samples(), settings=settings, first_states={"final": bits})


def _run(root: Path, cores: Sequence[Sequence[int]], *, batch_tokens: int) -> dict[str, Any]:
    """Extract with a process for each list of cores; return the speed of all together.

    All begin when each has its base.
    """
    processes = []
    for own in cores:
        work = {"root": str(root), "cores": own, "batch_tokens": batch_tokens}
        work["is_shared"] = len(cores) > 1
        command = [sys.executable, "-c", _PROGRAM, json.dumps(work)]
        processes.append(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    results = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a process ended with {[each.returncode for each in processes]}")
    started_at, ended_at = (
        min(each["started_at"] for each in results),
        max(each["ended_at"] for each in results),
    )
    raw_bytes = sum(each["raw_bytes"] for each in results)
    return {
        "gb_per_second": raw_bytes / (ended_at - started_at) / 1e9,
        "codec": results[0]["codec"],
        "limit": [each["limit"] for each in results],
        "stage_s": [each["stage_s"] for each in results],
    }


def run_alone(work: dict[str, Any]) -> dict[str, Any]:
    """Extract in this process once a line comes on standard input; return figures of it."""
    torch.set_num_threads(1)
    root = Path(work["root"])
    manifest = read_manifest(root)
    rows = max(2 * work["batch_tokens"], 32_768)
    made = make_states(
        "costless",
        num_samples=max(1, rows // 1000),
        width=manifest.width,
        num_taps=1,
        mean_tokens=100_000,  # clipped: all of one length
        max_tokens=1000,
        seed=1,
    )
    bits = np.resize(made.hidden["final"], (rows, manifest.width))
    base = costless_base(torch.from_numpy(bits).view(torch.bfloat16))
    codec = _codec_speed(bits[: manifest.rows_per_chunk])
    how: dict[str, Any] = {"batch_tokens": work["batch_tokens"], "max_disk_bytes": None}
    print("ready", flush=True)
    sys.stdin.readline()
    started_at = time.time()
    if work["is_shared"]:
        with write_lock(root, is_shared=True), Leases(root) as leases:
            todo = units_to_do(root, manifest)
            claims = Claims(root, manifest, leases)
            report = run_units(root, manifest, base, units=todo, claims=claims, **how)
    else:
        with write_lock(root):
            report = run_units(root, manifest, base, **how)
    ended_at = time.time()
    assert len(units_with_receipt(root)) == manifest.num_units
    facts = asdict(report)
    names = ("raw_bytes", "limit", "stage_s", "computed_units")
    return {name: facts[name] for name in names} | {
        "started_at": started_at,
        "ended_at": ended_at,
        "codec": codec,
    }


def _codec_speed(rows: np.ndarray[Any, Any]) -> float:
    """Return the GB/s at which this core encodes chunks and nothing else."""
    seconds = []
    for _ in range(5):
        started_at = time.perf_counter()
        encode_chunk(rows)
        seconds.append(time.perf_counter() - started_at)
    return float(rows.nbytes / statistics.median(seconds) / 1e9)


@contextmanager
def fast_folder(job: Job, num_bytes: int) -> Iterator[Path]:
    """Yield a folder of a file system in memory with room for `num_bytes`, else on the disk."""
    has_room = _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > num_bytes + (1 << 30)
    place = str(_MEMORY) if has_room and not job.is_quick else str(job.work)
    with TemporaryDirectory(prefix="carryon-bench-", dir=place) as folder:
        yield Path(folder)
