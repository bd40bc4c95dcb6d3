"""What extracting costs beside the bare forward passes that it cannot do without."""

import contextlib
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from carryon.cache.base.model import Base, read_head
from carryon.cache.corpus.dataset import Corpus, Sample
from carryon.cache.extraction.describe import describe, plan_corpus
from carryon.cache.extraction.forward import run_units
from carryon.cache.extraction.layout_writer import write_plan
from carryon.cache.extraction.packing import plan_batches
from carryon.cache.extraction.pilot import make_probe, run_pilot
from carryon.cache.format.manifest import Manifest
from carryon.cache.settings import CorpusSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_writer import UnitInput, read_sample_places, read_unit_input
from carryon.tools.compare.figure import Figure, Report

TARGET = 0.97


def measure_extraction(
    base: Base,
    samples: list[Sample],
    work: Path,
    *,
    unit_tokens: int,
    batch_tokens: int,
    report: Report,
) -> None:
    """Report tokens/s of whole extractions against tokens/s of the bare forward passes.

    For every unit in turn: the base's decoder over its length-sorted batches and nothing else,
    and all of `run_units` for this one unit: the same passes, then encoding, writing, waiting for
    the disk, the receipt. In a longer extraction that tail runs beside the next unit's passes, so
    the ratio is at worst what is measured here.
    """
    root = work / "extracted"
    manifest = _plan(root, base, samples, StoreSettings(unit_tokens=unit_tokens))
    inputs = _read_inputs(root, manifest)
    _run_bare(base, inputs[0], batch_tokens=batch_tokens)  # the first pass is slower
    bare, whole = [_NOTHING] * len(inputs), [_NOTHING] * len(inputs)
    for unit, unit_input in enumerate(inputs):
        for is_bare in (True, False) if unit % 2 == 0 else (False, True):
            if is_bare:
                bare[unit] = _timed(partial(_run_bare, base, unit_input, batch_tokens=batch_tokens))
            else:
                whole[unit] = _timed(
                    partial(_extract, root, manifest, base, unit, batch_tokens=batch_tokens)
                )
    tokens = [unit_input.num_tokens for unit_input in inputs]
    ratios = [before.elapsed_s / after.elapsed_s for before, after in zip(bare, whole, strict=True)]
    cpu_ratios = [before.cpu_s / after.cpu_s for before, after in zip(bare, whole, strict=True)]
    report(
        Figure(
            figure="extract.speed",
            value=statistics.median(ratios),
            unit="x bare forward",
            target=TARGET,
            sense="at least",
            details={
                "ratios": ratios,
                "cpu_time_ratio": statistics.median(cpu_ratios),
                "tokens": sum(tokens),
                "units": len(inputs),
                "unit_tokens": unit_tokens,
                "batch_tokens": batch_tokens,
                "bare_tokens_per_second": sum(tokens) / sum(one.elapsed_s for one in bare),
                "extract_tokens_per_second": sum(tokens) / sum(one.elapsed_s for one in whole),
                "base": base.identity.id,
                "device": str(base.device),
                "compute_dtype": str(base.compute_dtype).removeprefix("torch."),
            },
        )
    )


def samples_of(store: Store, *, max_tokens: int) -> list[Sample]:
    """Return samples of a store, units in order, up to `max_tokens` tokens; no state is read."""
    found: list[Sample] = []
    num_tokens = 0
    for unit in store.iter_units(taps=[]):
        for index in unit.samples:
            rows = unit.sample(index)
            num_tokens += len(rows.tokens)
            if found and num_tokens > max_tokens:
                return found
            found.append(
                Sample(
                    id=str(index),
                    tokens=rows.tokens,
                    loss_mask=rows.loss_mask,
                    char_end=rows.char_end,
                    is_held_out=False,
                )
            )
    return found


def _plan(root: Path, base: Base, samples: list[Sample], settings: StoreSettings) -> Manifest:
    tokens = [len(sample.tokens) for sample in samples]
    supervised = [int(sample.loss_mask.sum()) for sample in samples]
    counts = {
        "samples": len(samples),
        "tokens": sum(tokens),
        "supervised_tokens": sum(supervised),
    }
    texts = Corpus(samples=samples, fingerprint="0" * 64, files=[], counts=counts)
    plan = plan_corpus(texts, settings)
    manifest = describe(base, texts, plan, corpus=CorpusSettings(), store=settings)
    probe = make_probe(run_pilot(base, settings.taps, samples, plan))
    return write_plan(root, manifest, samples, plan, head=read_head(base), probe=probe)


def _read_inputs(root: Path, manifest: Manifest) -> list[UnitInput]:
    starts, lengths = read_sample_places(root, manifest)
    bounds = np.searchsorted(starts, np.arange(manifest.num_units + 1) * manifest.unit_tokens)
    spans = [slice(bounds[unit], bounds[unit + 1]) for unit in range(manifest.num_units)]
    return [
        read_unit_input(root, manifest, unit, starts=starts[span], lengths=lengths[span])
        for unit, span in enumerate(spans)
    ]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Time:
    """What some work took."""

    elapsed_s: float
    cpu_s: float
    """Of all threads; leaves out the time that other programs had the cores."""


_NOTHING = _Time(elapsed_s=0.0, cpu_s=0.0)


def _timed(work: Callable[[], None]) -> _Time:
    started_at, cpu_started_at = time.perf_counter(), time.process_time()
    work()
    return _Time(
        elapsed_s=time.perf_counter() - started_at, cpu_s=time.process_time() - cpu_started_at
    )


def _run_bare(base: Base, unit_input: UnitInput, *, batch_tokens: int) -> None:
    """Run the decoder over a unit's length-sorted batches and wait for it; keep nothing."""
    lengths, starts = unit_input.lengths, unit_input.starts
    for batch in plan_batches(lengths, batch_tokens=batch_tokens):
        ids = np.zeros((len(batch), int(lengths[batch].max())), dtype=np.int64)
        for row, sample in enumerate(batch):
            tokens = unit_input.tokens[starts[sample] : starts[sample] + lengths[sample]]
            ids[row, : lengths[sample]] = tokens
        with torch.inference_mode():
            base.architecture.decoder(
                input_ids=torch.from_numpy(ids).to(base.device), use_cache=False
            )
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)  # else only the launches would be timed


def _extract(root: Path, manifest: Manifest, base: Base, unit: int, *, batch_tokens: int) -> None:
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        run_units(
            root, manifest, base, batch_tokens=batch_tokens, max_disk_bytes=None, units=[unit]
        )
