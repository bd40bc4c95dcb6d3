"""This checkout beside an earlier commit: what that one wrote opens, same bits, same speed.

Both run as processes of the command line, each with its own source first on the import path. The
bits of a run depend on processor and libraries, so both are made here, never compared with stored
digests. Two runs differ from FIRST_LAYOUT: the rounding noise of `low_memory` was seeded by
Python's `hash` of a tuple, and is seeded by a SeedSequence since; `sampled` had other rows.
"""

import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.tools.bench.corpora import write_named_corpus
from carryon.tools.bench.job import Job
from carryon.tools.compare.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
FIRST_LAYOUT = "0d284f8"
"""The last commit with flat folders."""
RENAMED = {
    "--tokens-per-step": "--batch-tokens",
    "--intermediate-size": "--mlp-width",
    "--min-lr-ratio": "--final-share",
}
"""Option of today -> its name at that commit."""
RUNS: dict[str, list[str]] = {
    "bottleneck": ["--dropout", "0.1"],
    "low_memory": ["--weights-dtype", "bfloat16", "--step-in-backward", "--grad-clip", "0"],
    "sampled": ["--sampled-softmax", "256"],
    "top": ["--kind", "top", "--blocks", "1", "--lora-rank", "4"],
}
"""Runs whose bits are compared, by name: their options."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A checkout, as a command line."""

    path: Path
    """Folder that holds `carryon`, with the three packages in it."""
    module: str
    is_old: bool

    def call(self, *words: object, cwd: Path) -> dict[str, Any]:
        """Run `carryon WORDS` in `cwd` and return its JSON result."""
        texts = [str(word) for word in words]
        if self.is_old:
            texts = [RENAMED.get(text, text) for text in texts]
        command = [sys.executable, "-m", self.module, *texts]
        done = subprocess.run(
            command, cwd=cwd, env=self.environment(), capture_output=True, text=True
        )
        if done.returncode:
            raise InputError(f"carryon {texts[0]} failed in {self.path}: {done.stderr[-2000:]}")
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        result: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return result

    def way_of_before(self) -> list[str]:
        """Return the options for the one way of the loss that there was before a choice."""
        settings = (self.path / "carryon/train").rglob("*.py")
        has_choice = any("loss_way" in path.read_text(encoding="utf-8") for path in settings)
        return ["--loss-way", "attention"] if has_choice else []

    def environment(self) -> dict[str, str]:
        """Return the variables with which Python imports this checkout."""
        return os.environ | {"PYTHONPATH": str(self.path)}


def measure_bits(job: Job, *, commit: str = FIRST_LAYOUT, tokens: int = 30_000) -> None:
    """Report how many files differ between stores, runs, a sweep and a lineage of both.

    Args:
        job: input; the base is a folder.
        commit: the earlier commit, checked out into a temporary worktree.
        tokens: tokens of the corpus.
    """
    for figure in _run(job, _compare_bits, commit=commit, tokens=tokens):
        job.add(figure)


def measure_extraction(
    job: Job, *, commit: str = FIRST_LAYOUT, tokens: int = 30_000, rounds: int = 3
) -> None:
    """Report the extraction speed relative to the earlier commit."""
    for figure in _run(job, _compare_extraction, commit=commit, tokens=tokens, rounds=rounds):
        job.add(figure)


def measure_training(
    job: Job, *, commit: str = FIRST_LAYOUT, tokens: int = 30_000, rounds: int = 3
) -> None:
    """Report the training speed relative to the earlier commit."""
    for figure in _run(job, _compare_training, commit=commit, tokens=tokens, rounds=rounds):
        job.add(figure)


def measure_demo(job: Job, *, commit: str = FIRST_LAYOUT) -> None:
    """Report the speed of the demo relative to the earlier commit."""
    for figure in _run(job, _compare_demo, commit=commit, tokens=1):
        job.add(figure)


def _run(
    job: Job,
    compare: Callable[..., Iterator[Figure]],
    *,
    commit: str,
    tokens: int,
    **options: int,
) -> Iterator[Figure]:
    write_named_corpus("python", job.work / "texts.jsonl", num_tokens=tokens)
    with sources(commit) as pair:
        yield from compare(pair, Path(job.base).resolve(), job.work, **options)


@contextmanager
def sources(commit: str) -> Iterator[tuple[Source, Source]]:
    """Yield the earlier commit and this checkout."""
    with tempfile.TemporaryDirectory() as scratch:
        old, folder = Path(scratch) / "old", Path(scratch) / "old-path"
        _git("worktree", "add", "--detach", str(old), commit)
        try:
            for root, place in ((old, folder), (ROOT, Path(scratch) / "new-path")):
                (place / "carryon").mkdir(parents=True)
                for name in ("cache", "train", "tools"):
                    (place / "carryon" / name).symlink_to(root / name)
            is_flat = (old / "tools/main.py").exists()
            if is_flat and importlib.util.find_spec("jsonargparse") is None:
                raise InputError(
                    f"{commit}: expected jsonargparse, which its command line imports, got none. "
                    'Fix: pip install "jsonargparse[signatures]==4.53.0" docstring-parser'
                )
            module = "carryon.tools.main" if is_flat else "carryon.tools.cli.main"
            yield (
                Source(path=folder, module=module, is_old=is_flat),
                Source(
                    path=Path(scratch) / "new-path", module="carryon.tools.cli.main", is_old=False
                ),
            )
        finally:
            _git("worktree", "remove", "--force", str(old))


def _git(*words: str) -> None:
    subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True)


def _compare_bits(pair: Sequence[Source], base: Path, work: Path) -> Iterator[Figure]:
    """Yield how many files differ between stores, runs, a sweep and a lineage of both."""
    made: list[dict[str, str]] = []
    for number, source in enumerate(pair):
        folder = work / f"bits-{number}"
        folder.mkdir()
        made.append(_make_all(source, base, work / "texts.jsonl", folder))
    old, new = made
    for group in sorted({name.split("/")[0] for name in old}):
        names = [name for name in old if name.split("/")[0] == group]
        wrong = [name for name in names if old[name] != new.get(name)]
        yield Figure(
            figure=f"before.bits.{group}",
            value=len(wrong),
            unit="files that differ",
            target=0,
            details={"files": len(names), "different": wrong},
        )


def _make_all(source: Source, base: Path, texts: Path, folder: Path) -> dict[str, str]:
    """Make a store, runs, a sweep and a lineage; return file -> SHA-256 of all weights."""
    num_layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    middle, top = f"layer.{num_layers // 2}", f"layer.{num_layers - 1}"
    taps = ["--taps", *dict.fromkeys(["final", middle, top]), "--with-blocks", "1"]
    parts = [folder / f"part-{number}.jsonl" for number in range(3)]
    lines = texts.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, part in enumerate(parts):
        part.write_text("".join(lines[number::3]), encoding="utf-8")
    extract = ["extract", "--base", base, "--out", "store", "--unit-tokens", "2048", "--max-tokens"]
    extract = [*extract, "128", "--long", "split"]
    source.call(*extract, "--data", parts[0], *taps, cwd=folder)
    for part in parts[1:]:
        source.call(*extract, "--data", part, *taps, "--append", cwd=folder)
    common = ["--epochs", "1", "--tokens-per-step", "128", "--width", "32", "--learning-rate"]
    common = [*common, "0.001", "--intermediate-size", "64", *source.way_of_before()]
    for name, options in RUNS.items():
        shape = [] if name == "top" else ["--taps", "final", middle]
        run = ["--store", "store#1", *common, *shape, *options]
        source.call("train", *run, "--out", f"run/{name}", cwd=folder)
    vary = ["--vary", "learning_rate=0.001,0.002", "seed=0,1"]
    source.call("sweep", "--store", "store#1", *common, *vary, "--out", "sweep", cwd=folder)
    for number in range(1, 4):
        name = f"store#{number}"
        update = ["update", "--lineage", "lineage", "--store", name, "--min-lr-ratio", "0.1"]
        source.call(*update, *common, cwd=folder)
    digests = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).as_posix()
        is_shard = place.startswith("store/hidden/") and "/c/" in place
        if path.is_file() and (is_shard or path.name == "carryon.safetensors"):
            digests[place] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def _compare_extraction(
    pair: Sequence[Source], base: Path, work: Path, *, rounds: int
) -> Iterator[Figure]:
    def measure(source: Source, place: Path) -> float:
        words = ["--base", base, "--data", work / "texts.jsonl", "--out", place]
        words += ["--max-tokens", "512", "--long", "split"]
        report = source.call("extract", *words, cwd=work)
        return float(report["num_tokens"]) / float(report["elapsed_s"])

    yield _ratio("before.extract", pair, work / "extract", measure, rounds=rounds)


def _compare_training(
    pair: Sequence[Source], base: Path, work: Path, *, rounds: int
) -> Iterator[Figure]:
    words = ["--base", base, "--data", work / "texts.jsonl", "--out", "speed-store"]
    pair[1].call("extract", *words, "--max-tokens", "512", "--long", "split", cwd=work)

    def measure(source: Source, place: Path) -> float:
        run = ["--store", "speed-store", "--out", place, "--epochs", "1"]
        return float(source.call("train", *run, cwd=work)["tokens_per_second"])

    yield _ratio("before.train", pair, work / "train", measure, rounds=rounds)


def _compare_demo(pair: Sequence[Source], base: Path, work: Path) -> Iterator[Figure]:
    def measure(source: Source, place: Path) -> float:
        started_at = time.perf_counter()
        source.call("demo", "--out", place, cwd=work)
        return 1 / (time.perf_counter() - started_at)

    yield _ratio("before.demo", pair, work / "demo", measure, rounds=1)


def _ratio(
    name: str,
    pair: Sequence[Source],
    work: Path,
    measure: Callable[[Source, Path], float],
    *,
    rounds: int,
) -> Figure:
    """Return new / old of a speed: median of the rounds' ratios, the order changing in turn."""
    ratios, speeds = [], []
    for number in range(rounds):
        speed = [0.0, 0.0]
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            place = work.with_name(f"{work.name}-{number}-{which}")
            speed[which] = measure(pair[which], place)
        speeds.append(speed)
        ratios.append(speed[1] / speed[0])
    return Figure(
        figure=name,
        value=statistics.median(ratios),
        unit="of the earlier speed",
        target=0.98,
        sense="at least",
        details={"old_and_new": speeds},
    )
