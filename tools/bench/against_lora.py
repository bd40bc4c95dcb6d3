"""`carryon compare` on the corpora of this folder, with targets; hours."""

from dataclasses import replace

from carryon.tools.bench.corpora import GSM, MANPAGES, PYDOC, write_named_corpus
from carryon.tools.bench.job import Job
from carryon.tools.compare.command import run_comparison
from carryon.tools.compare.settings import CompareSettings

METHODS = ("lora", "full", "bottleneck", "native", "top", "top-lora", "linear", "mlp")
TARGETS = {
    (GSM, "first_run.300s"): 0.10,
    (GSM, "second_run.300s"): 0.10,
    (PYDOC, "first_run.150s"): 0.08,
    (PYDOC, "first_run.300s"): 0.0,
    (PYDOC, "second_run.300s"): 0.05,
    (MANPAGES, "first_run.300s"): 0.0,
    (MANPAGES, "second_run.300s"): 0.05,
}
"""Nats that the best carry-on ends below LoRA."""
TOP_SPEED_TARGET = 3.0


def measure_corpora(
    job: Job,
    *,
    corpora: tuple[str, ...] = (GSM, PYDOC, MANPAGES),
    methods: tuple[str, ...] = METHODS,
    seconds: tuple[float, ...] = (150.0, 300.0),
    seeds: int = 1,
    tokens: int = 120_000,
    held_out_tokens: int = 12_000,
) -> None:
    """Compare methods on each corpus."""
    settings = CompareSettings(
        methods=list(methods),
        seconds=list(seconds),
        seeds=list(range(seeds)),
        tokens=tokens,
        held_out_tokens=held_out_tokens,
    )
    for corpus in corpora:
        data = job.work / f"{corpus}.jsonl"
        # Every eighth document is held out, and ends of documents are dropped.
        wanted = max(tokens, 8 * held_out_tokens) * 4 // 3
        write_named_corpus(corpus, data, num_tokens=wanted)
        out = str(job.work / corpus)
        for figure in run_comparison(base=job.base, data=[str(data)], out=out, settings=settings):
            name = figure.figure.removeprefix("compare.")
            target = TOP_SPEED_TARGET if name == "speed.top" else TARGETS.get((corpus, name))
            job.add(replace(figure, figure=f"compare.{corpus}.{name}", target=target))
