"""Predictions of an extraction against what it writes and how long it takes."""

import time
from pathlib import Path
from typing import Any

from carryon.cache.base.model import load_base
from carryon.cache.extraction.estimate import estimate
from carryon.cache.extraction.pipeline import run_extraction
from carryon.cache.extraction.plan import plan_extraction
from carryon.cache.settings import CorpusSettings, DataSettings, ForwardSettings, StoreSettings
from carryon.tools.bench.corpora import write_named_corpus
from carryon.tools.bench.job import Job, split_label
from carryon.tools.bench.tiny_base import make_tiny_base

BYTES_TARGET, SECONDS_TARGET = 0.03, 0.15
"""Largest relative errors."""
_BYTES = ("raw_bytes", "stored_bytes", "head_bytes", "blocks_bytes", "store_bytes")


def measure_prediction(
    job: Job, *, tokens: int = 49_152, unit_tokens: int = 8192, batch_tokens: int = 4096
) -> None:
    """Report how far an extraction's predictions are off, by its first batches and by a dry run.

    Without a base a tiny random one is made, whose files and fixed costs outweigh its states.
    """
    folder = job.base or str(make_tiny_base(job.work / "base"))
    base = load_base(folder, forward=ForwardSettings())
    limit = min(1024, base.identity.context_tokens, unit_tokens)
    given = split_label(job.corpora[0])[1] if job.corpora else ""
    if not given or "=" not in job.corpora[0]:
        given = str(job.work / "corpus.jsonl")
        name = job.corpora[0] if job.corpora else "python"
        write_named_corpus(name, Path(given), num_tokens=tokens)
    plan = plan_extraction(
        base=base,
        data=[given],
        out=job.work / "store",
        corpus=CorpusSettings.from_dict({"long": "split", "max_tokens": limit}),
        store=StoreSettings.from_dict({"unit_tokens": unit_tokens}),
        forward=ForwardSettings.from_dict({"batch_tokens": batch_tokens}),
        data_settings=DataSettings(),
    )
    dry = estimate(plan)
    cpu_started_at = time.process_time()
    report = run_extraction(plan)
    cpu_s = time.process_time() - cpu_started_at
    assert report.predicted is not None
    predicted, written = report.predicted, report.written
    profile = dry.profiles[plan.manifest.settings["profile"]]
    details: dict[str, Any] = {
        "base": base.identity.id,
        "samples": plan.manifest.num_samples,
        "tokens": report.num_tokens,
        "units": report.num_units,
        "batch_tokens": batch_tokens,
        "longest": int(plan.samples.lengths.max()),
        "shortest": int(plan.samples.lengths.min()),
    }
    errors = {name: error_of(getattr(predicted, name), getattr(written, name)) for name in _BYTES}
    job.report(
        "extract.predicted.bytes",
        max(errors.values()),
        "relative error",
        at_most=BYTES_TARGET,
        errors=errors,
        predicted={name: getattr(predicted, name) for name in _BYTES},
        written={name: getattr(written, name) for name in _BYTES},
        dry_run_error=max(
            error_of(profile.store_bytes, written.store_bytes),
            error_of(profile.stored_bytes, written.stored_bytes),
            error_of(dry.head_bytes, written.head_bytes),
        ),
        **details,
    )
    job.report(
        "extract.predicted.seconds",
        error_of(predicted.elapsed_s, written.elapsed_s),
        "relative error",
        at_most=SECONDS_TARGET,
        predicted_s=predicted.elapsed_s,
        elapsed_s=written.elapsed_s,
        cpu_s=cpu_s,
        dry_run_s=dry.elapsed_s,
        **details,
    )


def error_of(predicted: float, actual: float) -> float:
    """Return the relative error of a prediction; 0 if both are 0."""
    if predicted == actual:
        return 0.0
    return abs(predicted - actual) / max(actual, 1e-9)
