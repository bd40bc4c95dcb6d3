"""Running the base over units: each computed, written, and committed by its receipt.

While a unit is compressed and written by a thread, the base is already at the next one. Units are
independent of each other and of the order they are computed in. Letters: B rows of a batch, T
positions, R rows of a unit, D base width.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from carryon.cache.base import Base
from carryon.cache.capture import capture
from carryon.cache.layout import ITEM_BYTES, shard_path
from carryon.cache.manifest import Manifest
from carryon.cache.plan import plan_batches
from carryon.cache.precision import STATE_TYPES
from carryon.cache.receipt import Receipt, units_with_receipt
from carryon.cache.unit_writer import UnitInput, read_sample_places, read_unit_input, write_unit


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractReport:
    """What an extraction did."""

    store: str
    fingerprint: str
    num_units: int
    num_tokens: int
    computed_units: int
    """Units computed by this call; the others had a receipt."""
    computed_tokens: int
    raw_bytes: int
    """Hidden states of the units computed, before compression, without unused rows."""
    stored_bytes: int
    """The same in the store."""
    elapsed_s: float
    """Seconds from the first forward pass to the last receipt."""
    is_finished: bool
    """False when the disk budget ended it."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def run_units(
    root: Path,
    manifest: Manifest,
    base: Base,
    *,
    batch_tokens: int,
    max_disk_bytes: int | None,
    units: Sequence[int] | None = None,
) -> ExtractReport:
    """Compute and commit the units that have no receipt, or the given ones.

    The caller holds the write lock. Ctrl-C ends it between two commits; nothing is lost but the
    unit at hand.
    """
    done = units_with_receipt(root)
    todo = [unit for unit in range(manifest.num_units) if unit not in done]
    todo = todo if units is None else list(units)
    starts, lengths = read_sample_places(root, manifest)
    bounds = np.searchsorted(starts, np.arange(manifest.num_units + 1) * manifest.unit_tokens)
    total = sum(int(lengths[bounds[unit] : bounds[unit + 1]].sum()) for unit in todo)
    receipts: list[Receipt] = []
    budget = _DiskBudget(root, max_disk_bytes)
    started_at = time.perf_counter()
    with (
        tqdm(total=total, unit="tok", desc="extract", disable=not todo) as bar,
        ThreadPoolExecutor(max_workers=1) as writer,
    ):
        pending: Future[Receipt] | None = None
        is_finished = True
        for unit in todo:
            if not budget.allows_another(receipts, has_pending=pending is not None):
                is_finished = False
                break
            span = slice(bounds[unit], bounds[unit + 1])
            unit_input = read_unit_input(
                root, manifest, unit, starts=starts[span], lengths=lengths[span]
            )
            unit_started_at = time.perf_counter()
            hidden = compute_unit(
                base, unit_input, manifest=manifest, batch_tokens=batch_tokens, bar=bar
            )
            elapsed_s = time.perf_counter() - unit_started_at
            if pending is not None:
                receipts.append(pending.result())
                bar.set_postfix_str(f"{_stored_bytes(receipts) / 1e6:,.0f} MB written")
            pending = writer.submit(
                write_unit, root, manifest, unit_input, hidden, elapsed_s=elapsed_s
            )
        if pending is not None:
            receipts.append(pending.result())
            bar.set_postfix_str(f"{_stored_bytes(receipts) / 1e6:,.0f} MB written")
    return _report(
        root, manifest, receipts, time.perf_counter() - started_at, is_finished=is_finished
    )


def compute_unit(
    base: Base,
    unit_input: UnitInput,
    *,
    manifest: Manifest,
    batch_tokens: int,
    bar: "tqdm[NoReturn] | None" = None,
) -> dict[str, NDArray[Any]]:
    """Run the base over one unit.

    Returns:
        For each tap of the store [R, D]: uint16 bits for an exact bfloat16 store, else float32.
        Rows that belong to no sample are 0.
    """
    settings = manifest.settings
    keeps_bits = settings["profile"] == "exact" and settings["dtype"] == "bfloat16"
    shape = (manifest.unit_tokens, manifest.width)
    dtype = np.uint16 if keeps_bits else np.float32
    hidden: dict[str, NDArray[Any]] = {tap: np.zeros(shape, dtype) for tap in manifest.taps}
    for batch in plan_batches(unit_input.lengths, batch_tokens=batch_tokens):
        lengths, starts = unit_input.lengths[batch], unit_input.starts[batch]
        ids = np.zeros((len(batch), int(lengths.max())), dtype=np.int64)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            ids[row, :length] = unit_input.tokens[start : start + length]
        for tap, states in capture(base, manifest.taps, torch.from_numpy(ids)).items():
            found = states.bfloat16().view(torch.uint16) if keeps_bits else states.float()
            values = found.cpu().numpy()
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                hidden[tap][start : start + length] = values[row, :length]
        if bar is not None:
            bar.update(int(lengths.sum()))
    return hidden


def raw_bytes(manifest: Manifest, num_tokens: int) -> int:
    """Return the bytes of the hidden states of `num_tokens` tokens, uncompressed."""
    item_bytes = ITEM_BYTES[STATE_TYPES[manifest.settings["dtype"]]]
    return num_tokens * manifest.width * item_bytes * len(manifest.taps)


class _DiskBudget:
    """Whether one more unit fits under the limit, judged by the largest unit so far."""

    def __init__(self, root: Path, max_bytes: int | None) -> None:
        self._max_bytes = max_bytes
        self._used = _folder_bytes(root) if max_bytes is not None else 0

    def allows_another(self, receipts: list[Receipt], *, has_pending: bool) -> bool:
        if self._max_bytes is None:
            return True
        sizes = [_stored_bytes([receipt]) for receipt in receipts]
        largest = max(sizes, default=0)
        return self._used + sum(sizes) + largest * (1 + has_pending) <= self._max_bytes


def _report(
    root: Path, manifest: Manifest, receipts: list[Receipt], elapsed_s: float, *, is_finished: bool
) -> ExtractReport:
    tokens = sum(receipt.num_tokens for receipt in receipts)
    return ExtractReport(
        store=str(root),
        fingerprint=manifest.fingerprint,
        num_units=manifest.num_units,
        num_tokens=manifest.num_tokens,
        computed_units=len(receipts),
        computed_tokens=tokens,
        raw_bytes=raw_bytes(manifest, tokens),
        stored_bytes=sum(
            receipt.files[shard_path(tap, receipt.unit)].bytes
            for receipt in receipts
            for tap in manifest.taps
        ),
        elapsed_s=round(elapsed_s, 3),
        is_finished=is_finished,
    )


def _stored_bytes(receipts: list[Receipt]) -> int:
    return sum(entry.bytes for receipt in receipts for entry in receipt.files.values())


def _folder_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
