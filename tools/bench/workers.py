"""Extraction by two processes that claim units, or by two actors of Ray, relative to others."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from carryon.cache.format.receipt import units_with_receipt
from carryon.cache.format.zarr_metadata import receipt_path
from carryon.cache.optional import require
from carryon.cache.store.reader import Store
from carryon.tools.bench.corpora import write_named_corpus
from carryon.tools.bench.job import Job, in_turn

TARGET, RAY_TARGET = 1.0, 0.9
_ALONE: list[str] = []
_WORKERS = ["--workers", "2"]
_ACTORS = ["--workers", "2", "--backend", "ray"]


def measure_workers(
    job: Job,
    *,
    corpus: str = "gsm",
    tokens: int = 65_536,
    unit_tokens: int = 2048,
    threads: int = 2,
    rounds: int = 3,
) -> None:
    """Report tokens/s of two workers against one process, with as many threads in all.

    Counted from the receipts of the second half of the units, when both have loaded the base; the
    speeds of whole commands, from the first pass on, are among the details.

    Args:
        job: input.
        corpus: text to extract.
        tokens: of it, roughly.
        unit_tokens: tokens in a unit.
        threads: of one process, and of two workers together.
        rounds: of both ways in turn; medians count.
    """
    _compare(
        job,
        "extract.workers",
        {"one process": _ALONE, "two workers": _WORKERS},
        target=TARGET,
        corpus=corpus,
        tokens=tokens,
        unit_tokens=unit_tokens,
        threads=threads,
        rounds=rounds,
    )


def measure_ray(
    job: Job,
    *,
    corpus: str = "gsm",
    tokens: int = 65_536,
    unit_tokens: int = 2048,
    threads: int = 2,
    rounds: int = 3,
) -> None:
    """Report tokens/s of two actors of Ray against two workers that `--workers 2` starts."""
    require("ray", extra="ray", purpose="the benchmark store.ray")
    _compare(
        job,
        "extract.ray",
        {"two workers": _WORKERS, "two actors": _ACTORS},
        target=RAY_TARGET,
        corpus=corpus,
        tokens=tokens,
        unit_tokens=unit_tokens,
        threads=threads,
        rounds=rounds,
    )


def _compare(
    job: Job,
    figure: str,
    ways: Mapping[str, list[str]],
    *,
    target: float,
    corpus: str,
    tokens: int,
    unit_tokens: int,
    threads: int,
    rounds: int,
) -> None:
    """Report tokens/s of the second way against the first."""
    data = job.work / "texts.jsonl"
    write_named_corpus(corpus, data, num_tokens=tokens)
    words = ["--base", job.base, "--data", str(data), "--unit-tokens", str(unit_tokens)]
    words += ["--device", "cpu", "--long", "split"]
    whole: dict[str, list[float]] = {name: [] for name in ways}
    roots: list[Path] = []

    def run(name: str) -> float:
        roots.append(job.work / f"store-{len(roots)}")
        done = subprocess.run(
            [sys.executable, "-m", "carryon.tools.cli.main", "extract", *words, *ways[name]]
            + ["--out", str(roots[-1])],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            check=True,
        )
        report = json.loads(done.stdout.splitlines()[-1])
        whole[name].append(report["computed_tokens"] / report["elapsed_s"])
        return late_speed(roots[-1])

    first, second = ways
    speeds = in_turn({name: partial(run, name) for name in ways}, rounds=rounds)
    job.report(
        figure,
        speeds[second] / speeds[first],
        f"x {first}",
        at_least=target,
        tokens_per_second=speeds,
        whole_commands=whole,
        threads=threads,
        rounds=rounds,
        base=job.base,
    )


def late_speed(root: Path) -> float:
    """Return the tokens/s of the second half of a store's units, by the times of their receipts."""
    store = Store.open(root)
    times = {unit: (root / receipt_path(unit)).stat().st_mtime for unit in units_with_receipt(root)}
    order = sorted(times, key=lambda unit: times[unit])
    first, *late = order[(len(order) - 1) // 2 :]
    num_tokens = sum(
        int(store.sample_lengths[sample]) for unit in late for sample in store.unit_samples(unit)
    )
    return num_tokens / (times[late[-1]] - times[first])
