"""What the base runs over: batches of the units to compute, in order, while the disk has room."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.extraction.packing import Batch, make_batch, plan_batches
from carryon.cache.extraction.prediction import Pilot, spread
from carryon.cache.extraction.sharing.claims import UnitSource
from carryon.cache.extraction.stages.read_ahead import ReadAhead
from carryon.cache.extraction.stages.unit_writers import UnitWriters
from carryon.cache.format.manifest import Manifest
from carryon.cache.progress import Progress
from carryon.cache.store.shard_writer import UnitInput, UnitInputs
from carryon.cache.store.sizes import bytes_by_folder, raw_bytes

StatesOf = Callable[[UnitInput, Progress], dict[str, NDArray[Any]]]
"""Returns the states of a unit, as `compute_states` does, and counts its tokens."""
_CHUNK_OVERHEAD_BYTES = 1024  # header, checksum and index entry; or a chunk of zeros, compressed
_RECEIPT_BYTES = 4096
_LOOK_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What an extraction computes."""

    root: Path
    manifest: Manifest
    inputs: UnitInputs
    units: Sequence[int]
    """To compute."""
    read_tokens: NDArray[np.int32]
    """Tokens that the base reads for each sample of the store."""
    batch_tokens: int
    max_disk_bytes: int | None
    claims: UnitSource | None
    states_of: StatesOf | None
    """Computes the states of a unit. None: the base does."""
    pilot: Pilot | None = None
    """Predicts what the whole will take. None: nothing is predicted."""

    @property
    def has_batches(self) -> bool:
        """Whether the base runs over samples as they are."""
        return self.states_of is None and not self.manifest.alignment

    @property
    def is_piloted(self) -> bool:
        """Whether batches are timed for a prediction."""
        return self.pilot is not None and self.pilot.prediction is None


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A batch to compute, or all of a unit."""

    unit_input: UnitInput
    batch: Batch | None
    """None: all of the unit."""
    is_first: bool = True
    """Of its unit."""
    is_last: bool = True
    """Of its unit."""


def read_items(plan: Plan, writers: UnitWriters, reader: "ReadAhead[Item]") -> Iterator[Item]:
    """Yield what is to be computed, unit by unit, until the disk limit ends it."""
    claims = plan.claims
    todo = plan.units
    units = todo if claims is None else claims.iter_units(todo, is_over=reader.is_over)
    for unit in units:
        unit_input = plan.inputs.read(unit)
        if not _has_room(plan, unit_input, writers, reader):
            if claims:
                claims.give_back(unit)
            reader.is_cut = True
            return
        if plan.has_batches:
            yield from _batches_of(plan, unit_input)
        else:
            yield Item(unit_input=unit_input, batch=None)
        if claims:  # a unit that waits here may be computed by another process
            reader.wait_until_taken()


def _batches_of(plan: Plan, unit_input: UnitInput) -> Iterator[Item]:
    batches = plan_batches(unit_input.lengths, batch_tokens=plan.batch_tokens)
    if plan.is_piloted:
        batches = spread(batches)
    for number, samples in enumerate(batches, start=1):
        yield Item(
            unit_input=unit_input,
            batch=batch_of(unit_input, samples),
            is_first=number == 1,
            is_last=number == len(batches),
        )


def batch_of(unit: UnitInput, samples: NDArray[np.int64]) -> Batch:
    return make_batch(samples, lengths=unit.lengths, starts=unit.starts, tokens=unit.tokens)


def _has_room(
    plan: Plan, unit_input: UnitInput, writers: UnitWriters, reader: "ReadAhead[Item]"
) -> bool:
    """Return whether a unit stays within the disk limit, and expect it to be written.

    Units under way, also those of other processes, count with the most that they can add; where
    that is too much, those of this one are waited for.
    """
    largest, whole = (
        largest_unit_bytes(plan.manifest, count)
        for count in (unit_input.num_tokens, plan.manifest.unit_tokens)
    )
    while plan.max_disk_bytes is not None and not reader.is_over.is_set():
        others = plan.claims.num_others() * whole if plan.claims else 0
        under_way = writers.expected_bytes()
        present = sum(bytes_by_folder(plan.root).values())
        if present + under_way + others + largest <= plan.max_disk_bytes:
            break
        if not under_way:
            return False
        writers.wait_for_one(_LOOK_S)
    writers.expect(unit_input.unit, largest)
    return True


def largest_unit_bytes(manifest: Manifest, num_tokens: int) -> int:
    """Return the most bytes that a unit of `num_tokens` tokens can add to the store."""
    chunks = -(-num_tokens // manifest.rows_per_chunk)
    raw = raw_bytes(manifest, chunks * manifest.rows_per_chunk)  # incompressible: stored as it is
    scales = 4 * (manifest.unit_tokens + manifest.width)
    frames = manifest.unit_tokens // manifest.rows_per_chunk * _CHUNK_OVERHEAD_BYTES
    return raw + len(manifest.taps) * (scales + frames) + _RECEIPT_BYTES
