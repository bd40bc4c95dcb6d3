"""Extraction speed relative to the bare forward passes that it needs."""

import contextlib
import io
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from carryon.cache.base.model import Base, read_head
from carryon.cache.corpus.dataset import Corpus
from carryon.cache.corpus.report import Report
from carryon.cache.corpus.samples import Sample, SampleTable
from carryon.cache.device import attention_of_any_shape
from carryon.cache.extraction.forward import run_units
from carryon.cache.extraction.layout_writer import plan_files, write_plan
from carryon.cache.extraction.packing import plan_batches, plan_samples
from carryon.cache.extraction.pilot import make_probe, run_pilot
from carryon.cache.extraction.plan import describe
from carryon.cache.format.manifest import Manifest
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.cache.store.shard_writer import UnitInput, UnitInputs
from carryon.tools.bench.job import Job, synchronize
from carryon.tools.bench.states import samples_of

TARGET = 0.97


def measure_extraction(job: Job, *, tokens: int = 24_576, unit_tokens: int = 4096) -> None:
    """Report tokens/s of extraction against tokens/s of the bare forward passes.

    Each unit is run both ways in turn: the base's decoder over its length-sorted batches alone,
    and `run_units`, which also encodes, writes, syncs and commits. A longer extraction overlaps
    that tail with the next unit's passes, so the measured ratio is a lower bound.
    """
    base, batch_tokens = job.load_base(), ForwardSettings().batch_tokens
    samples = samples_of(job.open_store(num_tokens=tokens), max_tokens=tokens)
    root = job.work / "extracted"
    manifest = _plan(root, base, samples, StoreSettings(unit_tokens=unit_tokens))
    inputs = _read_inputs(root, manifest)
    run_bare(base, inputs[0], batch_tokens=batch_tokens)  # the first pass is slower
    bare, whole = [(0.0, 0.0)] * len(inputs), [(0.0, 0.0)] * len(inputs)
    for unit, unit_input in enumerate(inputs):
        for is_bare in (True, False) if unit % 2 == 0 else (False, True):
            if is_bare:
                bare[unit] = _times(partial(run_bare, base, unit_input, batch_tokens=batch_tokens))
            else:
                run = partial(_extract, root, manifest, base, unit, batch_tokens=batch_tokens)
                whole[unit] = _times(run)
    num_tokens = sum(unit_input.num_tokens for unit_input in inputs)
    ratios, cpu_ratios = (
        [before[clock] / after[clock] for before, after in zip(bare, whole, strict=True)]
        for clock in (0, 1)
    )
    job.report(
        "extract.speed",
        statistics.median(ratios),
        "x bare forward",
        at_least=TARGET,
        ratios=ratios,
        cpu_time_ratio=statistics.median(cpu_ratios),
        tokens=num_tokens,
        units=len(inputs),
        unit_tokens=unit_tokens,
        batch_tokens=batch_tokens,
        bare_tokens_per_second=num_tokens / sum(elapsed_s for elapsed_s, _ in bare),
        extract_tokens_per_second=num_tokens / sum(elapsed_s for elapsed_s, _ in whole),
        base=base.identity.id,
        device=str(base.device),
        compute_dtype=str(base.compute_dtype).removeprefix("torch."),
    )


def _plan(root: Path, base: Base, samples: list[Sample], settings: StoreSettings) -> Manifest:
    counts = {
        "samples": len(samples),
        "tokens": sum(len(sample.tokens) for sample in samples),
        "supervised_tokens": sum(int(sample.loss_mask.sum()) for sample in samples),
    }
    table = SampleTable.of(samples)
    texts = Corpus(
        samples=table,
        fingerprint="0" * 64,
        files=[],
        counts=counts,
        report=Report(records=len(table), kept=len(table), tokens=counts["tokens"]),
        kinds={},
        skipped=[],
    )
    plan = plan_samples(table, unit_tokens=settings.unit_tokens, seed=settings.seed)
    head = read_head(base)
    manifest = describe(base, head, texts, plan, corpus=CorpusSettings(), store=settings)
    probe = make_probe(run_pilot(base, settings.taps, table, plan))
    return write_plan(root, manifest, plan_files(manifest, table, plan, head=head, probe=probe))


def _read_inputs(root: Path, manifest: Manifest) -> list[UnitInput]:
    inputs = UnitInputs(root, manifest)
    return [inputs.read(unit) for unit in range(manifest.num_units)]


def _times(work: Callable[[], None]) -> tuple[float, float]:
    """Return the wall-clock seconds and the CPU seconds of all threads."""
    started_at, cpu_started_at = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started_at, time.process_time() - cpu_started_at


def run_bare(base: Base, unit_input: UnitInput, *, batch_tokens: int) -> None:
    """Run the decoder over a unit's length-sorted batches and drop the states."""
    lengths, starts = unit_input.lengths, unit_input.starts
    for batch in plan_batches(lengths, batch_tokens=batch_tokens):
        ids = np.zeros((len(batch), int(lengths[batch].max())), dtype=np.int64)
        for row, sample in enumerate(batch):
            tokens = unit_input.tokens[starts[sample] : starts[sample] + lengths[sample]]
            ids[row, : lengths[sample]] = tokens
        with torch.inference_mode(), attention_of_any_shape():
            base.architecture.decoder(
                input_ids=torch.from_numpy(ids).to(base.device), use_cache=False
            )
    synchronize()


def _extract(root: Path, manifest: Manifest, base: Base, unit: int, *, batch_tokens: int) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        run_units(
            root, manifest, base, batch_tokens=batch_tokens, max_disk_bytes=None, units=[unit]
        )
