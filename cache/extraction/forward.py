"""The base over units: each is computed, written, and committed by its receipt.

A thread compresses and writes a unit while the base runs over the next one. Units are independent
of each other and of the order they are computed in.
Letters: R rows of a unit, D base width.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base
from carryon.cache.device import HostCopy
from carryon.cache.errors import DamagedStoreError
from carryon.cache.extraction.aligned_forward import compute_aligned_states
from carryon.cache.extraction.packing import plan_batches
from carryon.cache.extraction.prediction import Pilot, TimedBatch, Totals, spread
from carryon.cache.extraction.sharing.claims import UnitSource
from carryon.cache.format.alignment import read_num_nodes, read_trees
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.receipt import Receipt, read_receipt, units_with_receipt
from carryon.cache.format.zarr_metadata import state_paths
from carryon.cache.progress import Progress
from carryon.cache.store.shard_writer import (
    UnitInput,
    UnitInputs,
    write_unit,
)
from carryon.cache.store.sizes import bytes_by_folder, raw_bytes

StatesOf = Callable[[UnitInput, Progress], dict[str, NDArray[Any]]]
"""Returns the states of a unit, as `compute_states` does, and counts its tokens."""
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
    """Units computed since this call began, by it or beside it; the others had a receipt."""
    computed_tokens: int
    raw_bytes: int
    """Hidden states of the units computed, before compression, without unused rows."""
    stored_bytes: int
    """The same in the store, with the scales of a lossy profile."""
    head_bytes: int
    """LM head and final norm in the store."""
    blocks_bytes: int
    """The base's last blocks in the store."""
    store_bytes: int
    """All files of the store."""
    elapsed_s: float
    """Seconds from the first forward pass to the last receipt."""
    is_finished: bool
    """False when the disk limit ended it."""
    predicted: Totals | None = None
    """The same quantities, predicted from the first batches. None: nothing was left to compute,
    other processes shared it, or the disk limit ended it before."""

    @property
    def written(self) -> Totals:
        """The quantities of a prediction, as they were."""
        values = {item.name: getattr(self, item.name) for item in fields(Totals)}
        return Totals(**values)


def run_units(
    root: Path,
    manifest: Manifest,
    base: Base,
    *,
    batch_tokens: int,
    max_disk_bytes: int | None,
    units: Sequence[int] | None = None,
    is_predicted: bool = False,
    claims: UnitSource | None = None,
    states_of: StatesOf | None = None,
) -> ExtractReport:
    """Compute and commit the units that have no receipt, or the given ones.

    The caller holds the write lock. Ctrl-C ends it between two commits; only the current unit is
    lost.

    Args:
        root: of the store.
        manifest: of the store.
        base: of the store.
        batch_tokens: tokens in one forward pass.
        max_disk_bytes: stop before the store would grow beyond it. None: no limit.
        units: to compute. None: those without a receipt.
        is_predicted: let the first batches say in the log what the whole will take.
        claims: how units are shared with other processes; no progress is shown. None: there are
            none.
        states_of: computes the states of a unit in place of `base`. None: the base does.
    """
    todo = units_to_do(root, manifest) if units is None else list(units)
    inputs = UnitInputs(root, manifest)
    unit_tokens = list(map(inputs.num_tokens, todo))
    read_tokens = read_num_nodes(root, manifest) if manifest.alignment else inputs.lengths
    pilot: Pilot | None = None
    if is_predicted and todo:
        pilot = Pilot(
            root,
            manifest,
            [read_tokens[rows] for rows in map(inputs.samples, todo)],
            units=todo,
            unit_tokens=unit_tokens,
            batch_tokens=batch_tokens,
        )
    is_finished = True
    writing: list[Future[Receipt | None]] = []  # at most the last of them is still at work
    write: Callable[..., Receipt | None] = write_unit if claims is None else claims.write_unit
    started_at = time.perf_counter()
    with (
        Progress(0 if claims else sum(unit_tokens), name="extract", unit="tokens") as progress,
        ThreadPoolExecutor(max_workers=1) as thread,
    ):
        for unit in todo if claims is None else claims.iter_units(todo):
            unit_input = inputs.read(unit)
            if max_disk_bytes is not None:
                wait(writing)
                num_writers = 1 + (claims.num_others() if claims else 0)
                largest = num_writers * largest_unit_bytes(manifest, unit_input.num_tokens)
                if _folder_bytes(root) + largest > max_disk_bytes:
                    is_finished = False
                    if claims:
                        claims.give_back(unit)
                    break
            unit_started_at = time.perf_counter()
            if pilot is not None:
                pilot.begin(unit)
            hidden = (
                states_of(unit_input, progress)
                if states_of is not None
                else _states_of_unit(
                    root,
                    manifest,
                    base,
                    unit_input,
                    read_tokens=read_tokens[inputs.samples(unit)],
                    batch_tokens=batch_tokens,
                    progress=progress,
                    pilot=pilot if pilot is not None and pilot.prediction is None else None,
                )
            )
            elapsed_s = time.perf_counter() - unit_started_at
            written = sum(_stored_bytes(manifest, each) for each in _finished(writing))
            progress.note = f"{written / 1e6:,.0f} MB written"
            writing.append(
                thread.submit(write, root, manifest, unit_input, hidden, elapsed_s=elapsed_s)
            )
    receipts = _finished(writing)
    elapsed_s = time.perf_counter() - started_at
    report = summarize(root, manifest, receipts, elapsed_s=elapsed_s, is_finished=is_finished)
    return replace(report, predicted=pilot.prediction) if pilot else report


def _states_of_unit(
    root: Path,
    manifest: Manifest,
    base: Base,
    unit_input: UnitInput,
    *,
    read_tokens: NDArray[np.int32],
    **how: Any,  # noqa: ANN401 -- passed on
) -> dict[str, NDArray[Any]]:
    """Run the base over the samples of a unit, or over their trees in an aligned store.

    Args:
        root: of the store.
        manifest: of the store.
        base: of the store.
        unit_input: of the unit.
        read_tokens: tokens that the base reads for each sample.
        how: as of `compute_states`.
    """
    keeps_bits = not manifest.is_lossy and manifest.settings["dtype"] == "bfloat16"
    if not manifest.alignment:
        return compute_states(base, manifest.taps, unit_input, keeps_bits=keeps_bits, **how)
    trees = read_trees(
        root,
        manifest,
        unit_input.unit,
        num_nodes=read_tokens,
        starts=unit_input.starts,
        lengths=unit_input.lengths,
    )
    return compute_aligned_states(
        base, manifest.taps, trees, read_tokens, keeps_bits=keeps_bits, **how
    )


def _finished(writing: Sequence[Future[Receipt | None]]) -> list[Receipt]:
    """Wait for the receipts of this process; a unit that another has committed has none here."""
    return [receipt for each in writing if (receipt := each.result()) is not None]


def summarize(
    root: Path,
    manifest: Manifest,
    receipts: Sequence[Receipt],
    *,
    elapsed_s: float,
    is_finished: bool,
) -> ExtractReport:
    """Return the report of an extraction that has written these receipts."""
    tokens, present = sum(receipt.num_tokens for receipt in receipts), bytes_by_folder(root)
    return ExtractReport(
        store=str(root),
        fingerprint=manifest.fingerprint,
        num_units=manifest.num_units,
        num_tokens=manifest.num_tokens,
        computed_units=len(receipts),
        computed_tokens=tokens,
        raw_bytes=raw_bytes(manifest, tokens),
        stored_bytes=sum(_stored_bytes(manifest, receipt) for receipt in receipts),
        head_bytes=present.get("head", 0),
        blocks_bytes=present.get("blocks", 0),
        store_bytes=sum(present.values()),
        elapsed_s=round(elapsed_s, 3),
        is_finished=is_finished,
    )


def units_to_do(root: Path, manifest: Manifest) -> list[int]:
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
    pilot: Pilot | None = None,
) -> dict[str, NDArray[Any]]:
    """Run the base over one unit, at most `batch_tokens` tokens (pads included) at a time.

    Returns:
        For each tap [R, D]: uint16 bits of bfloat16 if `keeps_bits`, else float32. Rows that
        belong to no sample are 0.
    """
    shape = (len(unit.tokens), base.identity.width)
    dtype = np.uint16 if keeps_bits else np.float32
    hidden: dict[str, NDArray[Any]] = {tap: np.zeros(shape, dtype) for tap in taps}

    def scatter(batch: NDArray[np.int64], copies: dict[str, HostCopy]) -> None:
        lengths, starts = unit.lengths[batch], unit.starts[batch]
        for tap, copy in copies.items():
            values = copy.read().numpy()
            for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
                hidden[tap][start : start + length] = values[row, :length]
        if progress is not None:
            progress.update(int(lengths.sum()))

    # A GPU computes a batch while the host scatters the one before it; batches of a pilot are timed
    # one by one.
    most_waiting = 1 if base.device.type == "cuda" and pilot is None else 0
    waiting: list[tuple[NDArray[np.int64], dict[str, HostCopy]]] = []
    batches = plan_batches(unit.lengths, batch_tokens=batch_tokens)
    for batch in spread(batches) if pilot is not None else batches:
        started_at = time.perf_counter()
        lengths, starts = unit.lengths[batch], unit.starts[batch]
        ids = np.zeros((len(batch), int(lengths.max())), dtype=np.int64)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            ids[row, :length] = unit.tokens[start : start + length]
        found = capture(base, taps, torch.from_numpy(ids))
        waiting.append((batch, _host_copies(found, keeps_bits=keeps_bits)))
        if len(waiting) > most_waiting:
            scatter(*waiting.pop(0))
        if pilot is not None:
            pilot.add(
                hidden,
                np.concatenate([np.arange(x, x + n) for x, n in zip(starts, lengths, strict=True)]),
                TimedBatch.of(lengths, seconds=time.perf_counter() - started_at),
            )
    for each in waiting:
        scatter(*each)
    return hidden


def _host_copies(states: Mapping[str, Tensor], *, keeps_bits: bool) -> dict[str, HostCopy]:
    return {
        tap: HostCopy(each.bfloat16().view(torch.uint16) if keeps_bits else each.float())
        for tap, each in states.items()
    }


def largest_unit_bytes(manifest: Manifest, num_tokens: int) -> int:
    """Return the most bytes that a unit of `num_tokens` tokens can add to the store."""
    chunks = -(-num_tokens // manifest.rows_per_chunk)
    raw = raw_bytes(manifest, chunks * manifest.rows_per_chunk)  # incompressible: stored as it is
    scales = 4 * (manifest.unit_tokens + manifest.width)
    frames = manifest.unit_tokens // manifest.rows_per_chunk * _CHUNK_OVERHEAD_BYTES
    return raw + len(manifest.taps) * (scales + frames) + _RECEIPT_BYTES


def _stored_bytes(manifest: Manifest, receipt: Receipt) -> int:
    """Return the bytes of a unit's hidden states in the store."""
    paths = state_paths(manifest.taps, receipt.unit, is_lossy=manifest.is_lossy)
    return sum(receipt.files[path].bytes for path in paths)


def _folder_bytes(root: Path) -> int:
    return sum(bytes_by_folder(root).values())
