"""Bytes of stored hidden states against raw bfloat16, and the error of lossy profiles at the head.

The stores hold exact states; the lossy profiles are encoded from them unit by unit, as an
extraction encodes them. Letters: R rows of a unit, D width, P positions, V vocabulary.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.base.lm_head import Head, widen
from carryon.cache.format.codec import encode_chunk, encode_shard
from carryon.cache.format.quantization import STEPS, from_codes, to_codes
from carryon.cache.format.zarr_metadata import shard_path
from carryon.cache.store.reader import Store
from carryon.cache.store.samples import Unit
from carryon.tools.bench.job import Job
from carryon.tools.bench.states import require_exact

LOSSLESS_TARGETS = {"gsm": 0.64, "python": 0.70}
"""By label of the store."""
PROFILE_TARGETS = {"near": (0.43, 5e-4), "compact": (0.36, 2e-3)}
"""Bytes / raw, and KL in nats."""
CORPORA = ("gsm", "python")
_KL_POSITIONS = 1024
_VOCABULARY_BLOCK = 8192  # rows of the head that are widened at a time: 19 MB at D = 576


def measure_lossless(job: Job) -> None:
    """Report stored / raw bytes of each tap of each store; only receipts are read."""
    for label, store in job.open_stores(CORPORA).items():
        require_exact(store)
        receipts = [store.receipt(unit) for unit in store.finished_units]
        num_tokens = sum(receipt.num_tokens for receipt in receipts)
        for tap in store.taps:
            stored = sum(
                store.receipt(unit).files[shard_path(tap, unit)].bytes
                for unit in store.finished_units
            )
            is_final = tap in ("final", store.taps[-1])
            job.report(
                f"lossless.{label}{_suffix(store, tap)}",
                stored / (num_tokens * store.width * 2),
                "of raw",
                at_most=LOSSLESS_TARGETS.get(label) if is_final else None,
                tap=tap,
                tokens=num_tokens,
                bytes_per_token=stored / num_tokens,
            )


def measure_profiles(job: Job) -> None:
    """Report bytes, KL and top-1 agreement of the lossy profiles on each store's states."""
    for label, store in job.open_stores(CORPORA).items():
        require_exact(store)
        head = store.head()
        for tap in store.taps:
            for profile, (max_bytes, max_kl) in PROFILE_TARGETS.items():
                figure = f"{profile}.{label}{_suffix(store, tap)}"
                num_bytes, num_tokens, exact, lossy = _encode(store, tap, profile)
                norms = np.linalg.norm(exact, axis=1)
                errors = {
                    "relative_error": float(
                        np.median(np.linalg.norm(lossy - exact, axis=1) / norms)
                    ),
                    "positions": len(exact),
                }
                if tap in ("final", "prenorm"):
                    errors |= through_head(head, exact, lossy, is_normed=tap == "final")
                job.report(
                    f"{figure}.bytes",
                    num_bytes / (num_tokens * store.width * 2),
                    "of raw",
                    at_most=max_bytes,
                    tap=tap,
                    tokens=num_tokens,
                    **errors,
                )
                if "kl" in errors:
                    job.report(
                        f"{figure}.kl", errors["kl"], "nats", at_most=max_kl, tap=tap, **errors
                    )


def _suffix(store: Store, tap: str) -> str:
    return "" if len(store.taps) == 1 else f".{tap}"


def _encode(
    store: Store, tap: str, profile: str
) -> tuple[int, int, NDArray[np.float32], NDArray[np.float32]]:
    """Encode all units of a tap; return bytes, tokens, and some states [P, D] exact and lossy."""
    num_bytes, num_tokens = 0, 0
    pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    units = sorted(store.finished_units)
    for number in units:
        unit = store.read_unit(number, taps=[tap])
        codes = to_codes(widen(unit.hidden[tap]), step=STEPS[profile])
        per_chunk = store.manifest.rows_per_chunk
        num_bytes += len(encode_shard(codes.codes, rows_per_chunk=per_chunk))
        num_bytes += len(encode_chunk(codes.token_scale))
        num_bytes += len(encode_chunk(codes.channel_scale))
        num_tokens += int(unit.lengths.sum())
        chosen = _choose_rows(unit, -(-_KL_POSITIONS // len(units)))
        pairs.append((widen(unit.hidden[tap][chosen]), widen(from_codes(codes)[chosen])))
    exact, lossy = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    return num_bytes, num_tokens, exact, lossy


def through_head(
    head: Head, exact: NDArray[np.float32], lossy: NDArray[np.float32], *, is_normed: bool
) -> dict[str, float]:
    """Return `kl` (mean nats, exact to lossy) and `top1` agreement of the next token.

    Args:
        head: of the base.
        exact: [P, D] the base's states.
        lossy: [P, D] the same, encoded and decoded.
        is_normed: whether the base's final norm is already applied.
    """
    expected, got = (
        log_probabilities(head, rows if is_normed else head.norm.apply(rows))
        for rows in (exact, lossy)
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
    """Return random rows of a unit's samples, seeded by its number."""
    rows = np.concatenate(
        [
            np.arange(start, start + length)
            for start, length in zip(unit.starts, unit.lengths, strict=True)
        ]
    )
    random = np.random.default_rng(unit.unit)
    return np.sort(random.choice(rows, min(num_rows, len(rows)), replace=False))
