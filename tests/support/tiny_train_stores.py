"""Stores made of arrays, without a base: for tests of the trainer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import FinalNorm, Head, widen
from carryon.cache.corpus.samples import Sample, SampleTable
from carryon.cache.extraction.layout_writer import plan_files, write_plan
from carryon.cache.extraction.packing import plan_units
from carryon.cache.format.head_arrays import head_facts
from carryon.cache.format.manifest import CorpusPart, Manifest
from carryon.cache.format.probe import NUM_LOGITS, Probe
from carryon.cache.format.quantization import STATE_TYPES, bfloat16_bits
from carryon.cache.format.zarr_metadata import chunk_rows
from carryon.cache.settings import StoreSettings
from carryon.cache.store.shard_writer import UnitInputs, write_unit

States = NDArray[np.float32] | NDArray[np.uint16]


def make_store(
    root: Path,
    samples: Sequence[Sample],
    states: Sequence[Mapping[str, States]],
    head: Head,
    *,
    settings: StoreSettings,
    base: dict[str, object] | None = None,
) -> Path:
    """Write a whole store of `samples`, whose states are [T, D] for each tap of the settings."""
    plan = plan_units(
        np.array([len(sample.tokens) for sample in samples], dtype=np.int32),
        np.array([sample.is_held_out for sample in samples], dtype=np.bool_),
        unit_tokens=settings.unit_tokens,
        seed=settings.seed,
    )
    counts = {
        "samples": len(samples),
        "tokens": sum(len(sample.tokens) for sample in samples),
        "supervised_tokens": sum(int(sample.loss_mask.sum()) for sample in samples),
    }
    part = CorpusPart(
        fingerprint="0" * 64,
        files=[],
        counts=counts,
        first_unit=0,
        num_units=plan.num_units,
        first_sample=0,
        num_samples=len(samples),
    )
    manifest = Manifest(
        base=base or {"id": "tiny", "weights_sha256": "0" * 64},
        forward={},
        corpus={},
        settings=settings.to_dict(),
        parts=[part],
        width=head.width,
        rows_per_chunk=chunk_rows(
            row_bytes=head.width * STATE_TYPES[settings.dtype].itemsize,
            unit_tokens=settings.unit_tokens,
        ),
        head=head_facts(head),
        versions={},
    )
    first = int(plan.order[0])
    probe = _probe(states[first], head, first_row=int(plan.start[0]))
    manifest = write_plan(
        root, manifest, plan_files(manifest, SampleTable.of(samples), plan, head=head, probe=probe)
    )
    inputs = UnitInputs(root, manifest)
    for unit in range(plan.num_units):
        inside = np.flatnonzero(plan.unit == unit)
        hidden = {}
        for tap in settings.taps:
            dtype = states[first][tap].dtype
            rows = np.zeros((settings.unit_tokens, head.width), dtype=dtype)
            for position in inside.tolist():
                start = int(plan.start[position]) - unit * settings.unit_tokens
                index = int(plan.order[position])
                rows[start : start + len(samples[index].tokens)] = states[index][tap]
            hidden[tap] = rows
        write_unit(root, manifest, inputs.read(unit), hidden, elapsed_s=0.0)
    return root


def _probe(states: Mapping[str, States], head: Head, *, first_row: int) -> Probe:
    taken = {tap: widen(values[:4]) for tap, values in states.items()}
    everything = np.broadcast_to(
        np.arange(head.vocab_size, dtype=np.int32), (len(taken["final"]), head.vocab_size)
    )
    logits = head.logits(taken["final"], everything)
    top = np.argsort(-logits, axis=1)[:, :NUM_LOGITS].astype(np.int32)
    return Probe(
        rows=first_row + np.arange(len(taken["final"]), dtype=np.int64),
        states=taken,
        top_ids=top,
        top_logits=np.take_along_axis(logits, top, axis=1),
    )


def make_tiny_store(
    root: Path,
    *,
    num_samples: int = 24,
    num_held_out: int = 4,
    width: int = 16,
    vocab_size: int = 64,
    unit_tokens: int = 64,
    taps: Sequence[str] = ("final",),
    seed: int = 0,
    profile: str = "exact",
    samples_seed: int | None = None,
    first_target: int = 2,
) -> Path:
    """Write a store of random samples of 5 to 12 tokens, whose next token can be learned.

    With 64 rows a unit holds some seven samples: 24 samples cross several units. Stores of one
    `seed` and other `samples_seed` have the same head. Tokens before `first_target` are no targets.
    """
    random = np.random.default_rng(seed)
    weight = random.normal(size=(vocab_size, width)).astype(np.float32)
    head = Head(
        weight=bfloat16_bits(weight),
        bias=None,
        logit_scale=1.0,
        softcap=None,
        norm=FinalNorm(
            kind="rms", eps=1e-6, weight_offset=0.0, weight=np.ones(width, np.float32), bias=None
        ),
    )
    if samples_seed is not None:
        random = np.random.default_rng(samples_seed)
    samples, states = [], []
    for index in range(num_samples):
        tokens = random.integers(0, vocab_size, random.integers(5, 13)).astype(np.int32)
        mask = np.ones(len(tokens), np.uint8)
        mask[:first_target] = 0
        is_held_out = index < num_held_out
        samples.append(
            Sample(
                id=f"sample-{index}",
                tokens=tokens,
                loss_mask=mask,
                char_end=np.arange(1, len(tokens) + 1, dtype=np.int32),
                is_held_out=is_held_out,
            )
        )
        # A state that hints at its next token, but not the way the head reads it.
        hint = np.roll(weight[np.roll(tokens, -1)], 1, axis=1)
        noise = random.normal(size=hint.shape).astype(np.float32)
        states.append({tap: (hint + 0.3 * noise).astype(np.float32) for tap in taps})
    settings = StoreSettings.from_dict(
        {"taps": list(taps), "unit_tokens": unit_tokens, "profile": profile}
    )
    return make_store(root, samples, states, head, settings=settings)
