"""Predict bytes and time of an extraction from a few batches. Nothing is written.

Letters: R rows, D base width.
"""

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from carryon.cache.extraction.forward import compute_states
from carryon.cache.extraction.layout_writer import plan_bytes, plan_files
from carryon.cache.extraction.packing import plan_batches
from carryon.cache.extraction.pilot import make_probe, measure_profile, run_pilot
from carryon.cache.extraction.plan import ExtractionPlan
from carryon.cache.extraction.prediction import (
    PlannedBatches,
    TimedBatch,
    fit_seconds,
    spread,
)
from carryon.cache.format.manifest import manifest_bytes
from carryon.cache.format.quantization import STEPS
from carryon.cache.format.zarr_metadata import ROW_ARRAYS
from carryon.cache.store.shard_writer import UnitInput
from carryon.cache.store.sizes import UnitSizes, raw_bytes, receipt_bytes
from carryon.cache.store.top_blocks import block_files

_TIMED_BATCHES = 5
_TIMED_S = 15.0
"""Seconds after which no further batch is run, if two have been."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileEstimate:
    """Predicted size of a store in one profile, and the error of its states."""

    stored_bytes: int
    """Of the hidden states, with the scales of a lossy profile."""
    store_bytes: int
    """Of the whole store."""
    ratio: float
    """Hidden states stored / raw."""
    errors: dict[str, dict[str, float]]
    """As in the manifest: for each tap its relative error, KL and top-1 agreement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Predicted bytes and time of an extraction."""

    num_samples: int
    num_tokens: int
    num_units: int
    pilot_tokens: int
    raw_bytes: int
    """Hidden states, uncompressed."""
    head_bytes: int
    """LM head and final norm in the store."""
    blocks_bytes: int
    """The base's last blocks in the store."""
    tokens_per_second: float
    elapsed_s: float
    """Predicted seconds of the whole extraction."""
    profiles: dict[str, ProfileEstimate]


def estimate(plan: ExtractionPlan) -> Estimate:
    """Run the base over a few batches and predict the bytes of each profile, and the time."""
    manifest, head = plan.manifest, plan.head
    pilot = run_pilot(plan.base, manifest.taps, plan.samples, plan.units)
    lengths = _lengths_by_unit(plan)
    timed, states = _run_timed(plan, lengths[0])
    planned = PlannedBatches.of(lengths, batch_tokens=plan.batch_tokens)
    elapsed_s = planned.seconds(fit_seconds(timed))
    files = plan_files(
        manifest,
        plan.samples,
        plan.units,
        head=head,
        probe=make_probe(pilot),
        blocks=block_files(plan.base, manifest.num_blocks),
        skipped=plan.skipped,
    )
    sizes_of_files = {path: len(content) for path, content in files}
    head_bytes, blocks_bytes = (
        sum(size for path, size in sizes_of_files.items() if path.startswith(folder))
        for folder in ("head/", "blocks/")
    )
    recorded = [path for path in sizes_of_files if path.partition("/c/")[0] not in ROW_ARRAYS]
    digests = {path: ["0" * 64] for path in recorded}
    rest = plan_bytes(sizes_of_files.items())
    rest += 2 * manifest_bytes(replace(manifest, files=digests))
    rest += receipt_bytes(manifest, manifest.num_units - 1) * manifest.num_units
    raw = raw_bytes(manifest, manifest.num_tokens)
    profiles = {}
    is_bfloat16 = manifest.settings["dtype"] == "bfloat16"
    for profile in ("exact", "raw", *STEPS) if is_bfloat16 else ("exact", "raw"):
        sizes = UnitSizes.measure(manifest, states, profile=profile)
        stored = sum(sizes.states_bytes(manifest, int(each.sum())) for each in lengths)
        profiles[profile] = ProfileEstimate(
            stored_bytes=stored,
            store_bytes=rest + stored,
            ratio=round(stored / raw, 4),
            errors=measure_profile(pilot, head, taps=manifest.taps, profile=profile),
        )
    return Estimate(
        num_samples=manifest.num_samples,
        num_tokens=manifest.num_tokens,
        num_units=manifest.num_units,
        pilot_tokens=len(next(iter(states.values()))),
        raw_bytes=raw,
        head_bytes=head_bytes,
        blocks_bytes=blocks_bytes,
        tokens_per_second=round(manifest.num_tokens / max(elapsed_s, 1e-9), 1),
        elapsed_s=round(elapsed_s, 1),
        profiles=profiles,
    )


def _lengths_by_unit(plan: ExtractionPlan) -> list[NDArray[np.int32]]:
    units = plan.units
    bounds = np.searchsorted(units.unit, np.arange(1, units.num_units))
    return np.split(plan.samples.lengths[units.order], bounds)


def _run_timed(
    plan: ExtractionPlan, lengths: NDArray[np.int32]
) -> tuple[list[TimedBatch], dict[str, NDArray[np.float32]]]:
    """Run some batches of the first unit, whose samples have `lengths`.

    Returns:
        The batches, and their states in the order of the store, tap by tap [R, D].
    """
    timed: list[TimedBatch] = []
    states: list[dict[str, NDArray[np.float32]]] = []
    places: list[NDArray[np.int64]] = []
    starts = plan.units.start
    batches = spread(plan_batches(lengths, batch_tokens=plan.batch_tokens))
    for batch in batches[:_TIMED_BATCHES]:
        tokens = [plan.samples[index].tokens for index in plan.units.order[batch].tolist()]
        started_at = time.perf_counter()
        states.append(
            compute_states(
                plan.base,
                plan.manifest.taps,
                _joined(tokens),
                keeps_bits=False,
                batch_tokens=plan.batch_tokens,
            )
        )
        seconds = time.perf_counter() - started_at
        rows = [
            start + np.arange(n) for start, n in zip(starts[batch], lengths[batch], strict=True)
        ]
        places.append(np.concatenate(rows))
        timed.append(TimedBatch.of(lengths[batch], seconds=seconds))
        if len(timed) > 1 and sum(each.seconds for each in timed) > _TIMED_S:
            break
    order = np.argsort(np.concatenate(places), kind="stable")
    return timed, {tap: np.concatenate([each[tap] for each in states])[order] for tap in states[0]}


def _joined(tokens: list[NDArray[np.int32]]) -> UnitInput:
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int32)
    return UnitInput(
        unit=0,
        first_sample=0,
        starts=np.cumsum(lengths, dtype=np.int64) - lengths,
        lengths=lengths,
        tokens=np.concatenate(tokens),
        sha256="",
    )
