"""A store as files of speculators, and those files as a store: which bits differ."""

import numpy as np

from carryon.cache.base.model import load_base
from carryon.cache.exchange.exporting import export_speculators
from carryon.cache.exchange.importing import plan_import, run_import
from carryon.cache.exchange.settings import ImportSettings
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import ForwardSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.job import Job
from carryon.tools.bench.tiny_base import make_tiny_base

_TAPS = ["prenorm", "layer.0", "layer.1"]


def measure_round_trip(job: Job, *, samples: int = 2000) -> None:
    """Report samples that differ after export and import; and their size in the files."""
    forward = ForwardSettings(device="cpu", compute_dtype="float32")
    base = load_base(str(make_tiny_base(job.work / "base")), forward=forward)
    random = np.random.default_rng(0)
    rows = [
        {"id": f"r{number}", "prompt": "the " * int(n), "completion": "thing on" * int(m)}
        for number, (n, m) in enumerate(random.integers(1, 12, (samples, 2)))
    ]
    extract(base=base, data=rows, out=job.work / "before", taps=_TAPS, unit_tokens=1024)
    export = export_speculators(job.work / "before", out=job.work / "files")
    plan = plan_import(
        job.work / "files",
        base=base,
        out=job.work / "after",
        imports=ImportSettings(taps=_TAPS, unit_tokens=1024),
    )
    run_import(plan)
    before, after = Store.open(job.work / "before"), Store.open(job.work / "after")
    places = {after.sample_id(index): index for index in range(after.num_samples)}
    differ = abs(after.num_samples - before.num_samples)
    for expected in before:
        got = after[places[expected.id]]
        names = ("tokens", "loss_mask", "char_end")
        is_same = all(np.array_equal(getattr(got, n), getattr(expected, n)) for n in names)
        is_same &= all(np.array_equal(got.hidden[tap], expected.hidden[tap]) for tap in _TAPS)
        differ += not is_same
    job.report(
        "exchange.differ",
        differ,
        f"of {before.num_samples} samples",
        at_most=0,
        megabytes=export.written_bytes / 1e6,
        export_s=export.elapsed_s,
    )
