"""Bytes of hidden states against raw bfloat16, and what a lossy profile does behind the head.

The states are those of stores that keep every bit; the lossy profiles are encoded from them unit
by unit, as an extraction would have done. Letters: R rows of a unit, D width, P positions, V
vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.base.lm_head import Head, widen
from carryon.cache.format.codec import encode_chunk, encode_shard
from carryon.cache.format.quantization import STEPS, from_codes, to_codes
from carryon.cache.format.zarr_metadata import shard_path
from carryon.cache.store.reader import Store, Unit
from carryon.tools.bench.states import require_exact
from carryon.tools.compare.figure import Figure, Report

LOSSLESS_TARGETS = {"gsm": 0.64, "python": 0.70}
"""By label of the store."""
PROFILE_TARGETS = {"near": (0.43, 5e-4), "compact": (0.36, 2e-3)}
"""Bytes / raw, and KL in nats."""
_KL_POSITIONS = 1024
_VOCABULARY_BLOCK = 8192  # rows of the head that are widened at a time: 19 MB at D = 576


def measure_lossless(label: str, store: Store, *, report: Report) -> None:
    """Report stored / raw bytes of each tap of a store; only receipts are read."""
    require_exact(store)
    num_tokens = sum(store.receipt(unit).num_tokens for unit in store.finished_units)
    for tap in store.taps:
        stored = sum(
            store.receipt(unit).files[shard_path(tap, unit)].bytes for unit in store.finished_units
        )
        is_final = tap in ("final", store.taps[-1])
        report(
            Figure(
                figure=f"lossless.{label}" + ("" if len(store.taps) == 1 else f".{tap}"),
                value=stored / (num_tokens * store.width * 2),
                unit="of raw",
                target=LOSSLESS_TARGETS.get(label) if is_final else None,
                details={"tap": tap, "tokens": num_tokens, "bytes_per_token": stored / num_tokens},
            )
        )


def measure_profiles(label: str, store: Store, *, report: Report) -> None:
    """Report bytes, KL and top-1 agreement of the lossy profiles on a store's states."""
    require_exact(store)
    head = store.head()
    units = sorted(store.finished_units)
    for tap in store.taps:
        suffix = "" if len(store.taps) == 1 else f".{tap}"
        for profile, (max_bytes, max_kl) in PROFILE_TARGETS.items():
            num_bytes, num_tokens = 0, 0
            rows: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
            for number in units:
                unit = store.read_unit(number, taps=[tap])
                codes = to_codes(widen(unit.hidden[tap]), step=STEPS[profile])
                per_chunk = store.manifest.rows_per_chunk
                num_bytes += len(encode_shard(codes.codes, rows_per_chunk=per_chunk))
                num_bytes += len(encode_chunk(codes.token_scale))
                num_bytes += len(encode_chunk(codes.channel_scale))
                num_tokens += int(unit.lengths.sum())
                chosen = _choose_rows(unit, -(-_KL_POSITIONS // len(units)))
                rows.append((widen(unit.hidden[tap][chosen]), widen(from_codes(codes)[chosen])))
            states, made = (np.concatenate(parts) for parts in zip(*rows, strict=True))
            norms = np.linalg.norm(states, axis=1)
            errors = {
                "relative_error": float(np.median(np.linalg.norm(made - states, axis=1) / norms)),
                "positions": len(states),
            }
            if tap in ("final", "prenorm"):
                errors |= through_head(head, states, made, is_normed=tap == "final")
            report(
                Figure(
                    figure=f"{profile}.{label}{suffix}.bytes",
                    value=num_bytes / (num_tokens * store.width * 2),
                    unit="of raw",
                    target=max_bytes,
                    details={"tap": tap, "tokens": num_tokens, **errors},
                )
            )
            if "kl" in errors:
                report(
                    Figure(
                        figure=f"{profile}.{label}{suffix}.kl",
                        value=errors["kl"],
                        unit="nats",
                        target=max_kl,
                        details={"tap": tap, **errors},
                    )
                )


def through_head(
    head: Head, states: NDArray[np.float32], made: NDArray[np.float32], *, is_normed: bool
) -> dict[str, float]:
    """Return `kl` (mean nats, states to made) and `top1` agreement of the next token.

    Args:
        head: of the base.
        states: [P, D] as the base gave them.
        made: [P, D] as a profile gives them back.
        is_normed: whether the base's final norm is already applied.
    """
    expected, got = (
        log_probabilities(head, rows if is_normed else head.norm.apply(rows))
        for rows in (states, made)
    )
    kl = (expected.exp() * (expected - got)).sum(dim=1).mean()
    top1 = (expected.argmax(dim=1) == got.argmax(dim=1)).float().mean()
    return {"kl": float(kl), "top1": float(top1)}


def log_probabilities(head: Head, states: NDArray[np.float32]) -> torch.Tensor:
    """Return [P, V] float32 log-probabilities of normed states [P, D]."""
    x = torch.from_numpy(np.ascontiguousarray(states))
    logits = torch.empty(len(x), head.vocab_size)
    for first in range(0, head.vocab_size, _VOCABULARY_BLOCK):
        rows = slice(first, first + _VOCABULARY_BLOCK)
        logits[:, rows] = x @ torch.from_numpy(widen(head.weight[rows])).T
    if head.bias is not None:
        logits += torch.from_numpy(head.bias)
    logits *= head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.log_softmax(logits, dim=1)


def _choose_rows(unit: Unit, num_rows: int) -> NDArray[np.int64]:
    """Return rows of a unit's samples, seeded by its number."""
    used: Sequence[NDArray[np.int64]] = [
        np.arange(start, start + length)
        for start, length in zip(unit.starts, unit.lengths, strict=True)
    ]
    rows = np.concatenate(used)
    random = np.random.default_rng(unit.unit)
    return np.sort(random.choice(rows, min(num_rows, len(rows)), replace=False))
