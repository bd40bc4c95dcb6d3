"""The base over units: each is computed, written, and committed by its receipt.

A thread compresses and writes a unit while the base runs over the next one. Units are independent
of each other and of the order they are computed in.
Letters: R rows of a unit, D base width.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base
from carryon.cache.errors import DamagedStoreError
from carryon.cache.extraction.aligned_forward import compute_aligned_states
from carryon.cache.extraction.packing import plan_batches
from carryon.cache.format.alignment import read_num_nodes, read_trees
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.receipt import Receipt, read_receipt, units_with_receipt
from carryon.cache.format.zarr_metadata import (
    shard_path,
)
from carryon.cache.progress import Progress
from carryon.cache.store.shard_writer import (
    UnitInput,
    UnitInputs,
    write_unit,
)

_CHUNK_OVERHEAD_BYTES = 1024  # header, checksum and index entry; or a chunk of zeros, compressed
_RECEIPT_BYTES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractReport:
    """Summary of an extraction."""

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
    """False when the disk limit ended it."""


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

    The caller holds the write lock. Ctrl-C ends it between two commits; only the current unit is
    lost.
    """
    todo = _units_to_do(root, manifest) if units is None else list(units)
    inputs = UnitInputs(root, manifest)
    num_tokens = sum(map(inputs.num_tokens, todo))
    keeps_bits = not manifest.is_lossy and manifest.settings["dtype"] == "bfloat16"
    num_nodes = read_num_nodes(root, manifest) if manifest.alignment else np.empty(0, np.int32)
    is_finished = True
    writing: list[Future[Receipt]] = []  # at most the last of them is still at work
    started_at = time.perf_counter()
    with (
        Progress(num_tokens, name="extract", unit="tokens") as progress,
        ThreadPoolExecutor(max_workers=1) as thread,
    ):
        for unit in todo:
            unit_input = inputs.read(unit)
            if max_disk_bytes is not None:
                wait(writing)
                largest = largest_unit_bytes(manifest, unit_input.num_tokens)
                if _folder_bytes(root) + largest > max_disk_bytes:
                    is_finished = False
                    break
            unit_started_at = time.perf_counter()
            how: dict[str, Any] = {
                "keeps_bits": keeps_bits,
                "batch_tokens": batch_tokens,
                "progress": progress,
            }
            if manifest.alignment:
                stop = unit_input.first_sample + len(unit_input.lengths)
                sizes = num_nodes[unit_input.first_sample : stop]
                trees = read_trees(
                    root,
                    manifest,
                    unit,
                    num_nodes=sizes,
                    starts=unit_input.starts,
                    lengths=unit_input.lengths,
                )
                hidden = compute_aligned_states(base, manifest.taps, trees, sizes, **how)
            else:
                hidden = compute_states(base, manifest.taps, unit_input, **how)
            elapsed_s = time.perf_counter() - unit_started_at
            written = sum(_stored_bytes(manifest, each.result()) for each in writing)
            progress.note = f"{written / 1e6:,.0f} MB written"
            writing.append(
                thread.submit(write_unit, root, manifest, unit_input, hidden, elapsed_s=elapsed_s)
            )
    receipts = [each.result() for each in writing]
    elapsed_s = time.perf_counter() - started_at
    return _report(root, manifest, receipts, elapsed_s=elapsed_s, is_finished=is_finished)


def _report(
    root: Path,
    manifest: Manifest,
    receipts: Sequence[Receipt],
    *,
    elapsed_s: float,
    is_finished: bool,
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
        stored_bytes=sum(_stored_bytes(manifest, receipt) for receipt in receipts),
        elapsed_s=round(elapsed_s, 3),
        is_finished=is_finished,
    )


def _units_to_do(root: Path, manifest: Manifest) -> list[int]:
    """Return the units without a valid receipt of this store."""
    done = set()
    for unit in units_with_receipt(root) & set(range(manifest.num_units)):
        with suppress(DamagedStoreError):
            read_receipt(root, manifest, unit)
            done.add(unit)
    return [unit for unit in range(manifest.num_units) if unit not in done]


def compute_states(
    base: Base,
    taps: Sequence[str],
    unit: UnitInput,
    *,
    keeps_bits: bool,
    batch_tokens: int,
    progress: Progress | None = None,
) -> dict[str, NDArray[Any]]:
    """Run the base over one unit, at most `batch_tokens` tokens (pads included) at a time.

    Returns:
        For each tap [R, D]: uint16 bits of bfloat16 if `keeps_bits`, else float32. Rows that
        belong to no sample are 0.
    """
    shape = (len(unit.tokens), base.identity.width)
    dtype = np.uint16 if keeps_bits else np.float32
    hidden: dict[str, NDArray[Any]] = {tap: np.zeros(shape, dtype) for tap in taps}
    for batch in plan_batches(unit.lengths, batch_tokens=batch_tokens):
        lengths, starts = unit.lengths[batch], unit.starts[batch]
        ids = np.zeros((len(batch), int(lengths.max())), dtype=np.int64)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            ids[row, :length] = unit.tokens[start : start + length]
        for tap, states in capture(base, taps, torch.from_numpy(ids)).items():
            kept = states.bfloat16().view(torch.uint16) if keeps_bits else states.float()
            values = kept.cpu().numpy()
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                hidden[tap][start : start + length] = values[row, :length]
        if progress is not None:
            progress.update(int(lengths.sum()))
    return hidden


def raw_bytes(manifest: Manifest, num_tokens: int) -> int:
    """Return the bytes of the hidden states of `num_tokens` tokens, uncompressed."""
    item_bytes = manifest.states_dtype.itemsize
    return num_tokens * manifest.width * item_bytes * len(manifest.taps)


def largest_unit_bytes(manifest: Manifest, num_tokens: int) -> int:
    """Return the most bytes that a unit of `num_tokens` tokens can add to the store."""
    chunks = -(-num_tokens // manifest.rows_per_chunk)
    raw = raw_bytes(manifest, chunks * manifest.rows_per_chunk)  # incompressible: stored as it is
    scales = 4 * (manifest.unit_tokens + manifest.width)
    frames = manifest.unit_tokens // manifest.rows_per_chunk * _CHUNK_OVERHEAD_BYTES
    return raw + len(manifest.taps) * (scales + frames) + _RECEIPT_BYTES


def _stored_bytes(manifest: Manifest, receipt: Receipt) -> int:
    """Return the bytes of a unit's hidden states in the store."""
    return sum(receipt.files[shard_path(tap, receipt.unit)].bytes for tap in manifest.taps)


def _folder_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
