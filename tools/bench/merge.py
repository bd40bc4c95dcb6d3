"""Whether kinds that merge keep their word, and how fast a `top` trains."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carryon.cache.settings import Settings, bounded
from carryon.tools.bench.command import get_measurement, run_measurements
from carryon.tools.bench.settings import not_positive
from carryon.tools.compare.figure import Report

FIGURES = {
    "native": "merged:measure_native",
    "top": "merged:measure_top",
    "adapter": "merged:measure_adapter",
    "generate": "merged:measure_generation",
    "speed": "top:measure_speed",
}
"""What can be measured, in the order in which it is -> the file of this folder and the function of
it that measures, called as function(job) with a MergeJob (bench_merge_job.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchMergeSettings(Settings):
    """What is measured."""

    base: str
    """Base to measure with: hub id, folder or .gguf file."""
    figures: list[str] = bounded(list(FIGURES), choices=FIGURES)
    """Some of: native, top (logits of the merged checkpoint against those of base + carry-on),
    adapter (the same of a `top` trained by LoRA: its PEFT adapter, and its checkpoint), generate
    (tokens/s of a merged `top` against the base), speed (training tokens/s of a `top` against LoRA
    on the whole base)."""
    store: str = ""
    """Store of that base to train from, with the taps `prenorm` and layer.(L-k) and the last k
    blocks. Empty: one is made on the way."""
    data: list[str] = field(default_factory=list)
    """Files of texts to make it from, all of them, as in carryon extract. None given: a piece of
    Python's standard library."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchMergeSizes(Settings):
    """How much is measured."""

    top_blocks: int = 8
    """Blocks k of a `top`; fewer where the base has not more."""
    native_blocks: int = 2
    """Blocks of a `native`."""
    steps: int = 2
    """Steps that carry-ons are trained by, and that a round of `speed` takes."""
    batch_tokens: int = 512
    """Tokens of a step, at most."""
    logit_tokens: int = 128
    """Tokens whose logits are compared, at most."""
    prompt_tokens: int = 32
    """Tokens of the prompt in `generate`, at most."""
    new_tokens: int = 32
    """Tokens that are generated."""
    rounds: int = 5
    """Rounds that medians are taken of."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return [not_positive(self.to_dict())]


def bench_merge(
    *,
    out: str = "",
    work: str = "",
    settings: BenchMergeSettings,
    sizes: BenchMergeSizes,
) -> list[dict[str, Any]]:
    """Measure kinds that merge: exactness and speed of what is written, speed of training a `top`.

    Carry-ons are trained for a few steps, merged or exported, and loaded by transformers and PEFT
    alone. Logits are compared in float32; the target is what rounding to bfloat16 changes, measured
    beside it: of the logits, and where a checkpoint is written in bfloat16 of its weights. Speeds
    are compared side by side: the same tokens, in one process, in turn, medians of several rounds.
    One JSON line for each figure goes to stdout, a table to stderr at the end. A target that is
    missed reads "met": false; the exit code stays 0.

    Example:
        python -m carryon.tools.bench merge --base demo/base --figures native top adapter

    Args:
        out: Folder for figures.jsonl. Empty for none.
        work: Folder for what is written on the way; what is written is removed. Empty for the
            system's folder for such things.
        settings: What is measured.
        sizes: How much is measured.
    """
    from carryon.tools.bench.merge_job import MergeJob, make_store

    if work:
        Path(work).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="carryon-bench-", dir=work or None) as folder:
        store = settings.store or make_store(Path(folder), settings, sizes)

        def measure(name: str, scratch: Path, report: Report) -> None:
            job = MergeJob(
                base=settings.base, store=store, sizes=sizes, work=scratch, report=report
            )
            get_measurement(FIGURES[name])(job)

        names = [name for name in FIGURES if name in settings.figures]
        found = run_measurements(names, measure, out=out, work=work)
    return [figure.to_dict() for figure in found]
