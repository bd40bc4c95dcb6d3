"""What an extraction would cost, from a pilot over a few thousand tokens. Nothing is written.

Letters: R rows, D base width.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base, read_head
from carryon.cache.corpus.dataset import Corpus
from carryon.cache.extraction.forward import raw_bytes
from carryon.cache.extraction.layout_writer import plan_bytes
from carryon.cache.extraction.packing import UnitPlan, plan_batches
from carryon.cache.extraction.pilot import make_probe, measure_profile, run_pilot
from carryon.cache.format.codec import encode_chunk, encode_shard
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.quantization import STEPS, bfloat16_bits, to_codes
from carryon.cache.store.top_blocks import block_files

_PILOT_ROWS = 4096
"""Tokens that are run; fewer only if the corpus has fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileForecast:
    """What one profile would cost, and what it does to the states."""

    store_bytes: int
    """Predicted size of the whole store."""
    ratio: float
    """Hidden states stored / raw."""
    errors: dict[str, dict[str, float]]
    """As in the manifest: for each tap its relative error, KL and top-1 agreement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What an extraction would cost."""

    num_samples: int
    num_tokens: int
    num_units: int
    pilot_tokens: int
    raw_bytes: int
    """Hidden states, uncompressed."""
    tokens_per_second: float
    elapsed_s: float
    """Predicted seconds of the whole extraction."""
    profiles: dict[str, ProfileForecast]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def estimate(
    base: Base, texts: Corpus, plan: UnitPlan, manifest: Manifest, *, batch_tokens: int
) -> Estimate:
    """Run a pilot and predict bytes, for each profile, and time."""
    states, elapsed_s = _run_timed(base, texts, plan, manifest, batch_tokens=batch_tokens)
    num_pilot = len(states[manifest.taps[0]])
    per_chunk = min(manifest.rows_per_chunk, num_pilot)
    whole = {tap: rows[: num_pilot // per_chunk * per_chunk] for tap, rows in states.items()}
    num_whole = len(whole[manifest.taps[0]])
    head = read_head(base)
    pilot = run_pilot(base, manifest.taps, texts.samples, plan)
    fixed = plan_bytes(
        manifest,
        texts.samples,
        plan,
        head=head,
        probe=make_probe(pilot),
        blocks=block_files(base, manifest.num_blocks),
    )
    fixed += manifest.num_units * _receipt_bytes(manifest)
    raw = raw_bytes(manifest, manifest.num_tokens)
    profiles = {}
    is_bfloat16 = manifest.settings["dtype"] == "bfloat16"
    for profile in ("exact", *STEPS) if is_bfloat16 else ("exact",):
        stored = sum(_stored_bytes(manifest, profile, rows, per_chunk) for rows in whole.values())
        ratio = stored / raw_bytes(manifest, num_whole)
        errors = measure_profile(pilot, head, taps=manifest.taps, profile=profile)
        profiles[profile] = ProfileForecast(
            store_bytes=fixed + round(ratio * raw), ratio=round(ratio, 4), errors=errors
        )
    rate = num_pilot / elapsed_s
    return Estimate(
        num_samples=manifest.num_samples,
        num_tokens=manifest.num_tokens,
        num_units=manifest.num_units,
        pilot_tokens=num_pilot,
        raw_bytes=raw,
        tokens_per_second=round(rate, 1),
        elapsed_s=round(manifest.num_tokens / rate, 1),
        profiles=profiles,
    )


def _receipt_bytes(manifest: Manifest) -> int:
    """Return the bytes of a receipt: a digest of each file, a checksum of each chunk."""
    num_chunks = manifest.unit_tokens // manifest.rows_per_chunk
    return 1000 + len(manifest.taps) * (200 + 16 * num_chunks)


def _run_timed(
    base: Base, texts: Corpus, plan: UnitPlan, manifest: Manifest, *, batch_tokens: int
) -> tuple[dict[str, NDArray[np.float32]], float]:
    """Return the states of the plan's first samples, tap by tap [R, D], and the seconds taken."""
    tokens, total = [], 0
    for index in plan.order.tolist():
        ids = texts.samples[index].tokens[: _PILOT_ROWS - total]
        tokens.append(ids)
        total += len(ids)
        if total == _PILOT_ROWS:
            break
    lengths = np.array([len(ids) for ids in tokens], dtype=np.int32)
    rows: dict[str, list[NDArray[np.float32]]] = {
        tap: [np.empty(0, np.float32)] * len(tokens) for tap in manifest.taps
    }
    elapsed_s = 0.0
    batches = plan_batches(lengths, batch_tokens=batch_tokens)
    # The first one twice: its first pass sets up kernels and memory, which a long run does once.
    for number, batch in enumerate([batches[0], *batches]):
        ids = np.zeros((len(batch), int(lengths[batch].max())), dtype=np.int64)
        for row, index in enumerate(batch.tolist()):
            ids[row, : lengths[index]] = tokens[index]
        started_at = time.perf_counter()
        states = capture(base, manifest.taps, torch.from_numpy(ids))
        found = {tap: values.float().cpu().numpy() for tap, values in states.items()}
        elapsed_s += time.perf_counter() - started_at if number else 0.0
        for tap, values in found.items():
            for row, index in enumerate(batch.tolist()):
                rows[tap][index] = values[row, : lengths[index]]
    return {tap: np.concatenate(parts) for tap, parts in rows.items()}, elapsed_s


def _stored_bytes(
    manifest: Manifest, profile: str, states: NDArray[np.float32], rows_per_chunk: int
) -> int:
    """Return the bytes of the pilot's states [R, D] in one profile, chunked as in the store."""
    scales = 0
    if profile in STEPS:
        codes = to_codes(states, step=STEPS[profile])
        values: NDArray[Any] = codes.codes
        scales = len(encode_chunk(codes.token_scale))
    elif manifest.settings["dtype"] == "bfloat16":
        values = bfloat16_bits(states)
    else:
        values = states.astype(manifest.settings["dtype"])
    return len(encode_shard(values, rows_per_chunk=rows_per_chunk)) + scales
