"""Extraction by vLLM beside extraction by transformers, both in bfloat16: speed and states."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.facts import read_facts
from carryon.cache.errors import InputError, MissingExtraError
from carryon.cache.exchange.engine.extraction import extract_with_vllm
from carryon.cache.exchange.engine.vllm_process import find_python
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.corpora import write_named_corpus
from carryon.tools.bench.job import Job, in_turn
from carryon.tools.bench.quality import train_runs
from carryon.train.inference.evaluate import evaluate

logger = logging.getLogger(__name__)

SPEED_TARGET, ERROR_TARGET, LOSS_TARGET = 1.4, 0.025, 0.005
_WAYS = ("transformers", "vllm")
_DTYPE: Literal["bfloat16"] = "bfloat16"


def measure_engine_speed(
    job: Job,
    *,
    corpus: str = "gsm",
    tokens: tuple[int, int] = (8192, 40_960),
    unit_tokens: int = 4096,
    threads: int = 1,
    rounds: int = 3,
) -> None:
    """Report tokens a CPU second of `carryon extract` by vLLM against transformers.

    Each way extracts a small and a large corpus, and the difference of the CPU seconds of both
    commands counts, all of their processes included: so starts, which do not grow, are left out.

    Args:
        job: input.
        corpus: text to extract.
        tokens: of the small and of the large one, roughly.
        unit_tokens: tokens in a unit.
        threads: of either way.
        rounds: of both ways in turn; medians count.
    """
    if not _has_vllm("vllm.speed"):
        return
    sizes = [job.work / f"texts-{size}.jsonl" for size in tokens]
    for path, size in zip(sizes, tokens, strict=True):
        write_named_corpus(corpus, path, num_tokens=size)
    roots: list[Path] = []

    def run(way: str, data: Path) -> tuple[float, int]:
        roots.append(job.work / f"store-{len(roots)}")
        words = [
            "--base",
            job.base,
            "--data",
            str(data),
            "--out",
            str(roots[-1]),
            "--device",
            "cpu",
        ]
        words += ["--backend", way, "--compute-dtype", _DTYPE, "--unit-tokens", str(unit_tokens)]
        before = _cpu_seconds()
        done = subprocess.run(
            [sys.executable, "-m", "carryon.tools.cli.main", "extract", *words, "--long", "split"],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            check=True,
        )
        report = json.loads(done.stdout.splitlines()[-1])
        return _cpu_seconds() - before, int(report["computed_tokens"])

    def speed(way: str) -> float:
        (small_s, fewer), (large_s, more) = (run(way, data) for data in sizes)
        return (more - fewer) / (large_s - small_s)

    speeds = in_turn({way: lambda way=way: speed(way) for way in _WAYS}, rounds=rounds)  # type: ignore[misc]
    job.report(
        "vllm.speed",
        speeds["vllm"] / speeds["transformers"],
        "of the tokens a CPU second of transformers",
        at_least=SPEED_TARGET,
        tokens_per_cpu_second=speeds,
        tokens=tokens,
        threads=threads,
        rounds=rounds,
        base=job.base,
        compute_dtype=_DTYPE,
    )


def measure_engine_states(
    job: Job, *, corpus: str = "gsm", tokens: int = 65_536, epochs: int = 3
) -> None:
    """Report how far states of vLLM are from those of transformers, and what that does to training.

    The loss of both carry-ons is measured on the states of transformers.

    Args:
        job: input.
        corpus: text to extract.
        tokens: of it, roughly.
        epochs: of training.
    """
    if not _has_vllm("vllm.states"):
        return
    data = job.work / "texts.jsonl"
    write_named_corpus(corpus, data, num_tokens=tokens)
    num_layers = read_facts(job.base).num_layers or 2
    taps = ["final", f"layer.{num_layers // 2}"]
    inputs = {
        "base": job.base,
        "data": [str(data)],
        "corpus": CorpusSettings(max_tokens=1024, long="split"),
        "store": StoreSettings(taps=taps),
        "forward": ForwardSettings(device="cpu", compute_dtype=_DTYPE),
    }
    own = extract(**inputs, out=job.work / "transformers")  # type: ignore[arg-type]
    theirs = extract_with_vllm(**inputs, out=job.work / "vllm")  # type: ignore[arg-type]
    for tap, errors in relative_errors(own, theirs).items():
        job.report(
            f"vllm.states.{tap}",
            float(np.median(errors)),
            "median relative error of a token",
            at_most=ERROR_TARGET,
            largest=float(errors.max()),
            percentile_99=float(np.quantile(errors, 0.99)),
            tokens=len(errors),
        )
    losses = {}
    for way, store in (("transformers", own), ("vllm", theirs)):
        report = train_runs(job, store.root, f"on-{way}", {way: {}}, epochs=epochs)[way]
        done = evaluate(store=str(own.root), carryon=report.carryon, samples="held-out")
        losses[way] = done.carryon_nll
    job.report(
        "vllm.trained_on",
        abs(losses["vllm"] / losses["transformers"] - 1),
        "of the loss on transformers' states",
        at_most=LOSS_TARGET,
        held_out_nll=losses,
        base_nll=done.base_nll,
        epochs=epochs,
    )


def relative_errors(own: Store, other: Store) -> dict[str, NDArray[np.float64]]:
    """Return |x' - x| / |x| of each token [N] at each tap, of two stores of the same samples."""
    found: dict[str, list[NDArray[np.float64]]] = {tap: [] for tap in own.taps}
    for number in range(own.num_samples):
        one, two = (store.read_sample(number) for store in (own, other))
        for tap in own.taps:
            x = one.float32(tap)
            distance = np.linalg.norm(two.float32(tap) - x, axis=1)
            found[tap].append(distance / np.maximum(np.linalg.norm(x, axis=1), 1e-30))
    return {tap: np.concatenate(errors) for tap, errors in found.items()}


def _has_vllm(name: str) -> bool:
    try:
        find_python("")
    except (MissingExtraError, InputError) as error:
        logger.warning(f"{name}: skipped, {error}")
        return False
    return True


def _cpu_seconds() -> float:
    """Return the CPU seconds of all processes that this one has started and that have ended."""
    used = getrusage(RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
