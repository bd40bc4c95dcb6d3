"""Stores written from arrays without a base, to measure writing, reading and opening.

The head and the probe derive from the states, so these stores open like any other.
Letters: N rows of the token axis, R rows of a unit, D width, S samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import FinalNorm, Head, widen
from carryon.cache.corpus.samples import Sample, SampleTable
from carryon.cache.extraction.layout_writer import array_documents, plan_files, write_plan
from carryon.cache.extraction.packing import UnitPlan, plan_samples
from carryon.cache.extraction.sample_tables import encode_tables
from carryon.cache.files.documents import digest_of
from carryon.cache.format.head_arrays import encode_head, head_facts
from carryon.cache.format.manifest import CorpusPart, Manifest
from carryon.cache.format.probe import Probe, channel_relative_error, encode_probe
from carryon.cache.format.quantization import (
    STATE_TYPES,
    STEPS,
    bfloat16_bits,
    from_codes,
    to_codes,
)
from carryon.cache.format.receipt import Receipt
from carryon.cache.format.zarr_metadata import chunk_rows
from carryon.cache.settings import CorpusSettings, StoreSettings
from carryon.cache.store.shard_writer import UnitInputs, write_unit
from carryon.tools.bench.states import VOCABULARY, StateSet

_PROBE_ROWS = 4
_NUM_LOGITS = 8


def plan_scratch(
    root: Path,
    samples: Sequence[Sample],
    *,
    settings: StoreSettings,
    first_states: Mapping[str, NDArray[np.uint16]],
    vocab_size: int = VOCABULARY,
    has_rows: bool = True,
) -> tuple[Manifest, UnitPlan]:
    """Write a store's plan, without hidden states.

    Args:
        root: folder of the store.
        samples: of the corpus; for many millions a SampleTable.
        settings: of the store.
        first_states: [n, D] bits of bfloat16 for each tap and for `final`: the states of the
            first rows of the plan, from which the probe is made.
        vocab_size: V of the head, at least VOCABULARY.
        has_rows: write tokens, masks and character ends of each unit.

    Returns:
        The manifest, and the position of each sample.
    """
    table = samples if isinstance(samples, SampleTable) else SampleTable.of(samples)
    plan = plan_samples(table, unit_tokens=settings.unit_tokens, seed=settings.seed)
    width = int(first_states["final"].shape[1])
    head = _random_head(width, vocab_size)
    manifest = Manifest(
        base={"id": "none", "revision": None},
        forward={},
        corpus=CorpusSettings().to_dict(),
        settings=settings.to_dict(),
        parts=[_part(samples, table.lengths, plan)],
        width=width,
        rows_per_chunk=chunk_rows(
            row_bytes=width * STATE_TYPES[settings.dtype].itemsize,
            unit_tokens=settings.unit_tokens,
        ),
        head=head_facts(head),
        versions={},
        profile_error=profile_error(
            {tap: first_states[tap] for tap in settings.taps}, settings.profile
        ),
    )
    probe = _make_probe(first_states, head)
    files: Iterator[tuple[str, bytes]] = plan_files(manifest, table, plan, head=head, probe=probe)
    if not has_rows:
        files = chain(
            encode_head(head),
            encode_tables(table, plan, manifest=manifest),
            encode_probe(probe),
            array_documents(manifest).items(),
        )
    return write_plan(root, manifest, files), plan


def write_scratch_unit(
    root: Path,
    manifest: Manifest,
    inputs: UnitInputs,
    unit: int,
    hidden: Mapping[str, NDArray[np.uint16]],
) -> Receipt:
    """Write a unit of states [R, D], as an extraction does after the forward passes."""
    return write_unit(root, manifest, inputs.read(unit), hidden, elapsed_s=0.0)


def write_scratch_store(
    root: Path, states: StateSet, *, settings: StoreSettings, vocab_size: int = VOCABULARY
) -> tuple[Manifest, list[Receipt]]:
    """Write a complete store of a set of states."""
    samples = states.samples()
    plan = plan_samples(
        SampleTable.of(samples), unit_tokens=settings.unit_tokens, seed=settings.seed
    )
    first = states.rows_of(int(plan.order[0]))
    manifest, plan = plan_scratch(
        root,
        samples,
        settings=settings,
        first_states={tap: rows[first] for tap, rows in states.hidden.items()},
        vocab_size=vocab_size,
    )
    inputs, receipts = UnitInputs(root, manifest), []
    for unit in range(plan.num_units):
        hidden = unit_states(states, plan, unit, unit_tokens=settings.unit_tokens)
        receipts.append(write_scratch_unit(root, manifest, inputs, unit, hidden))
    return manifest, receipts


def unit_states(
    states: StateSet, plan: UnitPlan, unit: int, *, unit_tokens: int
) -> dict[str, NDArray[np.uint16]]:
    """Return the states [R, D] of a unit; rows without a sample are 0."""
    hidden = {
        tap: np.zeros((unit_tokens, rows.shape[1]), dtype=rows.dtype)
        for tap, rows in states.hidden.items()
    }
    for position in np.flatnonzero(plan.unit == unit).tolist():
        rows = states.rows_of(int(plan.order[position]))
        start = int(plan.start[position]) - unit * unit_tokens
        for tap, unit_rows in hidden.items():
            unit_rows[start : start + rows.stop - rows.start] = states.hidden[tap][rows]
    return hidden


def profile_error(
    states: Mapping[str, NDArray[np.uint16]], profile: str
) -> dict[str, dict[str, float]]:
    """Return the error that a manifest records for a profile, by tap, measured on some states."""
    if profile not in STEPS:
        return {}
    errors = {}
    for tap, bits in states.items():
        exact = widen(bits)
        lossy = widen(from_codes(to_codes(exact, step=STEPS[profile])))
        errors[tap] = {"channel_relative_error": channel_relative_error(lossy, exact)}
    return errors


def _part(samples: Sequence[Sample], lengths: NDArray[np.int32], plan: UnitPlan) -> CorpusPart:
    counts = {
        "samples": len(samples),
        "tokens": int(lengths.sum()),
        "supervised_tokens": sum(int(sample.loss_mask.sum()) for sample in samples),
    }
    return CorpusPart(
        fingerprint=digest_of({"lengths": lengths.tolist()}),
        files=[],
        counts=counts,
        first_unit=0,
        num_units=plan.num_units,
        first_sample=0,
        num_samples=len(samples),
    )


def _random_head(width: int, vocab_size: int) -> Head:
    weight = np.random.default_rng(0).standard_normal((vocab_size, width), dtype=np.float32)
    ones = np.ones(width, dtype=np.float32)
    norm = FinalNorm(kind="rms", eps=1e-6, weight_offset=0.0, weight=ones, bias=None)
    return Head(weight=bfloat16_bits(weight), bias=None, logit_scale=1.0, softcap=None, norm=norm)


def _make_probe(first_states: Mapping[str, NDArray[np.uint16]], head: Head) -> Probe:
    # As in an extraction, not the first token, whose states may be far larger than others.
    first = min(1, len(first_states["final"]) - 1)
    rows = slice(first, min(first + _PROBE_ROWS, len(first_states["final"])))
    num_rows = rows.stop - rows.start
    states = {tap: widen(bits[rows]) for tap, bits in first_states.items()}
    every_id = np.tile(np.arange(VOCABULARY, dtype=np.int32), (num_rows, 1))
    logits = head.logits(states["final"], every_id)
    top = np.argsort(-logits, axis=1)[:, :_NUM_LOGITS].astype(np.int32)
    return Probe(
        rows=np.arange(rows.start, rows.stop, dtype=np.int64),
        states=states,
        top_ids=top,
        top_logits=np.take_along_axis(logits, top, axis=1),
    )
