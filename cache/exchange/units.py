"""Fill the units of a store from files, and commit each by its receipt.

Threads compress and write units while the next one is read; no base runs beside them.
Letters: R rows of a unit, T tokens of a sample, D base width.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import widen
from carryon.cache.exchange.state_file import StateFile, read_ahead
from carryon.cache.extraction.forward import units_to_do
from carryon.cache.extraction.stages.items import largest_unit_bytes
from carryon.cache.format.manifest import CorpusPart, Manifest
from carryon.cache.format.quantization import bfloat16_bits
from carryon.cache.format.receipt import Receipt
from carryon.cache.format.zarr_metadata import state_paths
from carryon.cache.progress import Progress
from carryon.cache.store.shard_writer import UnitInput, UnitInputs, write_unit
from carryon.cache.store.sizes import bytes_by_folder, raw_bytes

_WRITERS = 2
"""Units that are compressed and written at a time, which takes twice as long as to fill one."""

ReadTaps = Callable[[StateFile, NDArray[np.int32], NDArray[np.uint8]], Mapping[str, NDArray[Any]]]
"""Returns, of a file, its token ids [T] and memory for its bytes, the states [T, D] at each tap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportReport:
    """Summary of an import."""

    store: str
    fingerprint: str
    num_units: int
    num_tokens: int
    imported_units: int
    """Units written by this call; the others had a receipt."""
    imported_tokens: int
    imported_files: int
    read_bytes: int
    """Of the files that this call read."""
    raw_bytes: int
    """Hidden states of the units written, before compression, without unused rows."""
    stored_bytes: int
    """The same in the store, with the scales of a lossy profile."""
    elapsed_s: float
    """Seconds from the first file of states to the last receipt."""
    is_finished: bool
    """False when the disk limit ended it."""


def fill_units(
    root: Path,
    manifest: Manifest,
    part: CorpusPart,
    folder: Path,
    file_of: Callable[[int], StateFile],
    read_taps: ReadTaps,
    *,
    max_disk_bytes: int | None,
) -> ImportReport:
    """Write the units of a part that have no receipt.

    The caller holds the write lock. Ctrl-C ends it between two commits; only the current unit is
    lost.

    Args:
        root: of the store.
        manifest: of the store.
        part: whose units are written.
        folder: of the files.
        file_of: returns the file of a sample, counted from the first of the part.
        read_taps: reads a file.
        max_disk_bytes: stop before the store would grow beyond it. None: no limit.

    Raises:
        InputError: a file cannot be used; names it.
        DiskFullError: no space left; finished units are kept.
    """
    units = range(part.first_unit, part.first_unit + part.num_units)
    todo = [unit for unit in units_to_do(root, manifest) if unit in units]
    inputs = UnitInputs(root, manifest)
    writing: list[Future[Receipt]] = []  # at most the last _WRITERS are still at work
    read: list[StateFile] = []
    is_finished, memory = True, np.empty(0, np.uint8)
    started_at = time.perf_counter()
    with (
        Progress(sum(map(inputs.num_tokens, todo)), name="import", unit="tokens") as progress,
        ThreadPoolExecutor(max_workers=_WRITERS) as threads,
    ):
        for unit in todo:
            unit_input = inputs.read(unit)
            if max_disk_bytes is not None:
                wait(writing)
                if not _has_room(root, manifest, unit_input.num_tokens, max_disk_bytes):
                    is_finished = False
                    break
            files, next_files = _files_of(unit_input, part, file_of)
            read_ahead(folder, (file.name for file in next_files))
            unit_started_at = time.perf_counter()
            if (most := max(file.num_bytes for file in files)) > len(memory):
                memory = np.empty(most, np.uint8)
            hidden = _fill(manifest, unit_input, files, read_taps, memory, progress)
            read.extend(files)
            if len(writing) >= _WRITERS:
                writing[-_WRITERS].result()  # a full disk ends it here
            elapsed_s = time.perf_counter() - unit_started_at
            writing.append(
                threads.submit(write_unit, root, manifest, unit_input, hidden, elapsed_s=elapsed_s)
            )
    receipts = [each.result() for each in writing]
    elapsed_s = time.perf_counter() - started_at
    return _report(root, manifest, receipts, read, elapsed_s=elapsed_s, is_finished=is_finished)


def _has_room(root: Path, manifest: Manifest, num_tokens: int, max_disk_bytes: int) -> bool:
    """Return whether a unit of that many tokens stays within the disk limit, whatever its size."""
    largest = largest_unit_bytes(manifest, num_tokens)
    return sum(bytes_by_folder(root).values()) + largest <= max_disk_bytes


def _files_of(
    unit: UnitInput, part: CorpusPart, file_of: Callable[[int], StateFile]
) -> tuple[list[StateFile], list[StateFile]]:
    """Return the files of a unit's samples, and as many behind them, about those of the next."""
    first, count = unit.first_sample - part.first_sample, len(unit.lengths)
    stop = min(first + 2 * count, part.num_samples)
    files = [file_of(position) for position in range(first, stop)]
    return files[:count], files[count:]


def _report(
    root: Path,
    manifest: Manifest,
    receipts: Sequence[Receipt],
    read: Sequence[StateFile],
    *,
    elapsed_s: float,
    is_finished: bool,
) -> ImportReport:
    """Return the report of an import that has read these files and written these receipts."""
    tokens = sum(receipt.num_tokens for receipt in receipts)
    return ImportReport(
        store=str(root),
        fingerprint=manifest.fingerprint,
        num_units=manifest.num_units,
        num_tokens=manifest.num_tokens,
        imported_units=len(receipts),
        imported_tokens=tokens,
        imported_files=len(read),
        read_bytes=sum(file.num_bytes for file in read),
        raw_bytes=raw_bytes(manifest, tokens),
        stored_bytes=sum(
            receipt.files[path].bytes
            for receipt in receipts
            for path in state_paths(manifest.taps, receipt.unit, is_lossy=manifest.is_lossy)
        ),
        elapsed_s=round(elapsed_s, 3),
        is_finished=is_finished,
    )


def _fill(
    manifest: Manifest,
    unit: UnitInput,
    files: list[StateFile],
    read_taps: ReadTaps,
    memory: NDArray[np.uint8],
    progress: Progress,
) -> dict[str, NDArray[Any]]:
    """Return the states of a unit at each tap, [R, D]: bits of bfloat16, or float32.

    Rows that belong to no sample are 0.
    """
    hidden = empty_states(manifest, len(unit.tokens))
    for file, start, length in zip(files, unit.starts.tolist(), unit.lengths.tolist(), strict=True):
        rows = slice(start, start + length)
        put_states(hidden, rows, read_taps(file, unit.tokens[rows], memory))
        progress.update(length)
    return hidden


def empty_states(manifest: Manifest, num_rows: int) -> dict[str, NDArray[Any]]:
    """Return zeros [R, D] for each tap: uint16 for bits of bfloat16, or float32."""
    keeps_bits = not manifest.is_lossy and manifest.settings["dtype"] == "bfloat16"
    dtype = np.uint16 if keeps_bits else np.float32
    return {tap: np.zeros((num_rows, manifest.width), dtype) for tap in manifest.taps}


def put_states(
    hidden: Mapping[str, NDArray[Any]], rows: slice, taps: Mapping[str, NDArray[Any]]
) -> None:
    """Copy states of a file into rows of a unit, in the type of `empty_states`."""
    for tap, states in taps.items():
        if hidden[tap].dtype != np.uint16:
            hidden[tap][rows] = widen(states)
        else:
            is_bits = states.dtype == np.uint16
            hidden[tap][rows] = states if is_bits else bfloat16_bits(widen(states))
