"""Running the base over units: each computed, written, and committed by its receipt.

While a unit is compressed and written by a thread, the base is already at the next one. Units are
independent of each other and of the order they are computed in. Letters: B rows of a batch, T
positions, R rows of a unit, D base width.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base
from carryon.cache.errors import DamagedStoreError
from carryon.cache.extraction.packing import plan_batches
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.quantization import STATE_TYPES
from carryon.cache.format.receipt import Receipt, read_receipt, units_with_receipt
from carryon.cache.format.zarr_metadata import (
    ITEM_BYTES,
    ROW_ARRAYS,
    receipt_path,
    row_path,
    shard_path,
)
from carryon.cache.progress import Progress
from carryon.cache.store.shard_writer import (
    UnitInput,
    read_sample_places,
    read_unit_input,
    write_unit,
)

_CHUNK_OVERHEAD_BYTES = 1024  # header, checksum and index entry; or a chunk of zeros, compressed
_RECEIPT_BYTES = 4096


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
    todo = _units_to_do(root, manifest) if units is None else list(units)
    starts, lengths = read_sample_places(root, manifest)
    bounds = np.searchsorted(starts, np.arange(manifest.num_units + 1) * manifest.unit_tokens)
    total = sum(int(lengths[bounds[unit] : bounds[unit + 1]].sum()) for unit in todo)
    receipts: list[Receipt] = []
    budget = _DiskBudget(root, manifest, max_disk_bytes)
    started_at = time.perf_counter()
    with (
        Progress(total, name="extract", unit="tokens") as progress,
        ThreadPoolExecutor(max_workers=1) as writer,
    ):
        pending: Future[Receipt] | None = None
        is_finished = True

        def collect(written: Future[Receipt]) -> None:
            receipts.append(written.result())
            budget.settle(receipts[-1])
            progress.note = f"{budget.written / 1e6:,.0f} MB written"

        for unit in todo:
            span = slice(bounds[unit], bounds[unit + 1])
            num_tokens = int(lengths[span].sum())
            if pending is not None and not budget.has_room(num_tokens):
                collect(pending)  # its true size may leave room
                pending = None
            if not budget.has_room(num_tokens):
                is_finished = False
                break
            budget.reserve(num_tokens)
            unit_input = read_unit_input(
                root, manifest, unit, starts=starts[span], lengths=lengths[span]
            )
            unit_started_at = time.perf_counter()
            hidden = compute_unit(
                base, unit_input, manifest=manifest, batch_tokens=batch_tokens, progress=progress
            )
            elapsed_s = time.perf_counter() - unit_started_at
            if pending is not None:
                collect(pending)
            pending = writer.submit(
                write_unit, root, manifest, unit_input, hidden, elapsed_s=elapsed_s
            )
        if pending is not None:
            collect(pending)
    return _report(
        root, manifest, receipts, time.perf_counter() - started_at, is_finished=is_finished
    )


def _units_to_do(root: Path, manifest: Manifest) -> list[int]:
    """Return the units without a receipt; one that is damaged or of another store is none."""
    done = set()
    for unit in units_with_receipt(root) & set(range(manifest.num_units)):
        with suppress(DamagedStoreError):
            read_receipt(root, manifest, unit)
            done.add(unit)
    return [unit for unit in range(manifest.num_units) if unit not in done]


def compute_unit(
    base: Base,
    unit_input: UnitInput,
    *,
    manifest: Manifest,
    batch_tokens: int,
    progress: Progress | None = None,
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
        if progress is not None:
            progress.update(int(lengths.sum()))
    return hidden


def raw_bytes(manifest: Manifest, num_tokens: int) -> int:
    """Return the bytes of the hidden states of `num_tokens` tokens, uncompressed."""
    item_bytes = ITEM_BYTES[STATE_TYPES[manifest.settings["dtype"]]]
    return num_tokens * manifest.width * item_bytes * len(manifest.taps)


def largest_unit_bytes(manifest: Manifest, num_tokens: int) -> int:
    """Return the most that computing a unit of `num_tokens` tokens can add to the store."""
    chunks = -(-num_tokens // manifest.rows_per_chunk)
    raw = raw_bytes(manifest, chunks * manifest.rows_per_chunk)  # incompressible: stored as it is
    scales = 4 * (manifest.unit_tokens + manifest.width)
    frames = manifest.unit_tokens // manifest.rows_per_chunk * _CHUNK_OVERHEAD_BYTES
    return raw + len(manifest.taps) * (scales + frames) + _RECEIPT_BYTES


class _DiskBudget:
    """Whether one more unit is sure to fit under the limit, however badly it compresses."""

    def __init__(self, root: Path, manifest: Manifest, max_bytes: int | None) -> None:
        self._root, self._manifest = root, manifest
        self._left = None if max_bytes is None else max_bytes - _folder_bytes(root)
        self.written = 0
        """Bytes of the units settled."""

    def has_room(self, num_tokens: int) -> bool:
        return self._left is None or largest_unit_bytes(self._manifest, num_tokens) <= self._left

    def reserve(self, num_tokens: int) -> None:
        if self._left is not None:
            self._left -= largest_unit_bytes(self._manifest, num_tokens)

    def settle(self, receipt: Receipt) -> None:
        """Take the unit's true size in place of what was reserved for it."""
        rows = {row_path(name, receipt.unit) for name in ROW_ARRAYS}  # there since planning
        size = (self._root / receipt_path(receipt.unit)).stat().st_size
        size += sum(entry.bytes for path, entry in receipt.files.items() if path not in rows)
        self.written += size
        if self._left is not None:
            self._left += largest_unit_bytes(self._manifest, receipt.num_tokens) - size


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


def _folder_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
