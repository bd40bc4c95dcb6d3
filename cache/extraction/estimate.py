"""Predict bytes and time of an extraction from a few thousand tokens. Nothing is written.

Letters: R rows, D base width.
"""

import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from carryon.cache.extraction.forward import compute_states, raw_bytes
from carryon.cache.extraction.layout_writer import plan_bytes, plan_files
from carryon.cache.extraction.packing import plan_batches
from carryon.cache.extraction.pilot import make_probe, measure_profile, run_pilot
from carryon.cache.extraction.plan import ExtractionPlan
from carryon.cache.format.codec import encode_chunk, encode_shard
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.quantization import STEPS, bfloat16_bits, to_codes
from carryon.cache.store.shard_writer import UnitInput
from carryon.cache.store.top_blocks import block_files

_TIMED_TOKENS = 4096
"""Tokens that are run; fewer only if the corpus has fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileEstimate:
    """Predicted size of a store in one profile, and the error of its states."""

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
    tokens_per_second: float
    elapsed_s: float
    """Predicted seconds of the whole extraction."""
    profiles: dict[str, ProfileEstimate]


def estimate(plan: ExtractionPlan) -> Estimate:
    """Run the base over a few samples and predict the bytes of each profile, and the time."""
    manifest, head = plan.manifest, plan.head
    states, elapsed_s = _run_timed(plan)
    num_timed = len(states[manifest.taps[0]])
    per_chunk = min(manifest.rows_per_chunk, num_timed)
    num_whole = num_timed // per_chunk * per_chunk
    pilot = run_pilot(plan.base, manifest.taps, plan.samples, plan.units)
    blocks, probe = block_files(plan.base, manifest.num_blocks), make_probe(pilot)
    planned = plan_bytes(
        plan_files(manifest, plan.samples, plan.units, head=head, probe=probe, blocks=blocks)
    )
    # A receipt has a digest of each file and a checksum of each chunk.
    num_chunks = manifest.unit_tokens // manifest.rows_per_chunk
    planned += manifest.num_units * (1000 + len(manifest.taps) * (200 + 16 * num_chunks))
    raw = raw_bytes(manifest, manifest.num_tokens)
    profiles = {}
    is_bfloat16 = manifest.settings["dtype"] == "bfloat16"
    for profile in ("exact", *STEPS) if is_bfloat16 else ("exact",):
        whole = [rows[:num_whole] for rows in states.values()]
        stored = sum(_stored_bytes(manifest, profile, rows, per_chunk) for rows in whole)
        ratio = stored / raw_bytes(manifest, num_whole)
        profiles[profile] = ProfileEstimate(
            store_bytes=planned + round(ratio * raw),
            ratio=round(ratio, 4),
            errors=measure_profile(pilot, head, taps=manifest.taps, profile=profile),
        )
    rate = num_timed / elapsed_s
    return Estimate(
        num_samples=manifest.num_samples,
        num_tokens=manifest.num_tokens,
        num_units=manifest.num_units,
        pilot_tokens=num_timed,
        raw_bytes=raw,
        tokens_per_second=round(rate, 1),
        elapsed_s=round(manifest.num_tokens / rate, 1),
        profiles=profiles,
    )


def _run_timed(plan: ExtractionPlan) -> tuple[dict[str, NDArray[np.float32]], float]:
    """Return the states of the plan's first tokens, tap by tap [R, D], and the seconds taken."""
    tokens: list[NDArray[np.int32]] = []
    left = _TIMED_TOKENS
    for index in plan.units.order.tolist():
        tokens.append(plan.samples[index].tokens[:left])
        left -= len(tokens[-1])
        if not left:
            break
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    unit = UnitInput(
        unit=0,
        first_sample=0,
        starts=starts,
        lengths=lengths,
        tokens=np.concatenate(tokens),
        sha256="",
    )
    run = partial(
        compute_states,
        plan.base,
        plan.manifest.taps,
        keeps_bits=False,
        batch_tokens=plan.batch_tokens,
    )
    # A first pass sets up kernels and memory, which a long run does once.
    first = plan_batches(lengths, batch_tokens=plan.batch_tokens)[0]
    run(replace(unit, starts=starts[first], lengths=lengths[first]))
    started_at = time.perf_counter()
    states = run(unit)
    return states, time.perf_counter() - started_at


def _stored_bytes(
    manifest: Manifest, profile: str, states: NDArray[np.float32], rows_per_chunk: int
) -> int:
    """Return the bytes of states [R, D] in one profile, chunked as in the store."""
    if profile in STEPS:
        codes = to_codes(states, step=STEPS[profile])
        shard = encode_shard(codes.codes, rows_per_chunk=rows_per_chunk)
        return len(shard) + len(encode_chunk(codes.token_scale))
    dtype = manifest.settings["dtype"]
    values = bfloat16_bits(states) if dtype == "bfloat16" else states.astype(dtype)
    return len(encode_shard(values, rows_per_chunk=rows_per_chunk))
