"""The base over units: each is computed, written, and committed by its receipt.

Batches are read ahead, and units are encoded and written while the base runs over later ones
(`stages`). Units are independent of each other and of the order they are computed in.
Letters: R rows of a unit, D base width.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base
from carryon.cache.device import SideCopy, SideStreams, count_cores, reuse_freed_memory
from carryon.cache.errors import DamagedStoreError
from carryon.cache.extraction.aligned_forward import compute_aligned_states
from carryon.cache.extraction.packing import Batch, plan_batches
from carryon.cache.extraction.prediction import Pilot, TimedBatch
from carryon.cache.extraction.report import ExtractReport, stored_bytes, summarize
from carryon.cache.extraction.sharing.claims import UnitSource
from carryon.cache.extraction.stages.backpressure import limiting_stage, stage_seconds
from carryon.cache.extraction.stages.items import Item, Plan, StatesOf, batch_of, read_items
from carryon.cache.extraction.stages.read_ahead import ReadAhead
from carryon.cache.extraction.stages.staging import Staging
from carryon.cache.extraction.stages.unit_writers import MAX_ENCODERS, UnitWriters
from carryon.cache.format.alignment import read_num_nodes, read_trees
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.receipt import read_receipt, units_with_receipt
from carryon.cache.progress import Progress
from carryon.cache.store.shard_writer import UnitInput, UnitInputs, write_unit

_BATCHES_AHEAD = 4  # read while the base runs
_COPIES_AHEAD = 2  # batches that a GPU was given and has not copied yet


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
    num_encoders: int = 0,
) -> ExtractReport:
    """Compute and commit the units that have no receipt, or the given ones.

    The caller holds the write lock. Ctrl-C ends it between two commits, once the units that are
    computed are written; only the current one is lost. A kill loses five at most.

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
        num_encoders: threads that encode, MAX_ENCODERS at most. 0: one for each core.
    """
    inputs = UnitInputs(root, manifest)
    plan = Plan(
        root=root,
        manifest=manifest,
        inputs=inputs,
        units=units_to_do(root, manifest) if units is None else list(units),
        read_tokens=read_num_nodes(root, manifest) if manifest.alignment else inputs.lengths,
        batch_tokens=batch_tokens,
        max_disk_bytes=max_disk_bytes,
        claims=claims,
        states_of=states_of,
    )
    if is_predicted and plan.units:
        plan = replace(plan, pilot=_make_pilot(plan))
    return _carry_out(plan, base, num_encoders=min(MAX_ENCODERS, num_encoders or count_cores()))


def _carry_out(plan: Plan, base: Base, *, num_encoders: int) -> ExtractReport:
    """Run the stages of an extraction beside each other, and report what they did."""
    root, manifest, claims = plan.root, plan.manifest, plan.claims
    reuse_freed_memory()
    write = partial(write_unit, root, manifest) if claims is None else claims.write_unit
    stager = _stager(manifest, base)
    num_tokens = 0 if claims else sum(map(plan.inputs.num_tokens, plan.units))
    started_at = time.perf_counter()
    with (
        Progress(num_tokens, name="extract", unit="tokens") as progress,
        UnitWriters(root, manifest, write, stager, num_encoders=num_encoders) as writers,
    ):
        with ReadAhead(partial(read_items, plan, writers), most=_BATCHES_AHEAD) as reader:
            forward = _Forward(base, plan, writers, reader, progress)
            # A unit that cannot be written ends it, also while other processes are waited for.
            for item in reader.items(writers.collect):
                forward.run(item)
            forward.finish()
        writers.collect(waits=True)
    elapsed_s = time.perf_counter() - started_at
    is_finished = not reader.is_cut
    receipts = writers.receipts
    report = summarize(root, manifest, receipts, elapsed_s=elapsed_s, is_finished=is_finished)
    return replace(
        report,
        predicted=plan.pilot.prediction if plan.pilot else None,
        limit=limiting_stage(forward.waited_s, forward.elapsed_s),
        stage_s=stage_seconds(forward.waited_s, forward.elapsed_s),
    )


def _make_pilot(plan: Plan) -> Pilot:
    return Pilot(
        plan.root,
        plan.manifest,
        [plan.read_tokens[rows] for rows in map(plan.inputs.samples, plan.units)],
        units=plan.units,
        unit_tokens=list(map(plan.inputs.num_tokens, plan.units)),
        batch_tokens=plan.batch_tokens,
    )


class _Forward:
    """The base over batches, in the thread of the caller; a GPU is kept a few of them ahead."""

    def __init__(
        self,
        base: Base,
        plan: Plan,
        writers: UnitWriters,
        reader: "ReadAhead[Item]",
        progress: Progress,
    ) -> None:
        """Prepare."""
        self._base, self._plan, self._progress = base, plan, progress
        self._writers, self._reader = writers, reader
        self._staging: Staging | None = None
        self._waiting: deque[tuple[Batch, SideCopy]] = deque()
        self._started_at = time.perf_counter()
        self._unit_started_at = self._started_at
        self._stored_bytes, self._known = 0, 0
        self._before = (self.waited_s, 0.0)
        self.elapsed_s = 0.0
        """Seconds of all passes and waits, once they are finished."""

    @property
    def waited_s(self) -> dict[str, float]:
        """Seconds that the passes waited for other stages."""
        return {"read": self._reader.waited_s, **self._writers.waited_s}

    def run(self, item: Item) -> None:
        """Compute an item; hand its unit on behind the last one."""
        unit_input, plan = item.unit_input, self._plan
        if item.is_first:
            self._staging = self._writers.take() if item.batch is not None else None
            self._writers.collect()
            self._show_limit()
            if plan.pilot is not None:
                plan.pilot.begin(unit_input.unit)
            self._unit_started_at = time.perf_counter()
        if item.batch is None:
            states: Staging | dict[str, NDArray[Any]] = self._run_unit(unit_input)
        else:
            assert self._staging is not None  # taken with the first batch
            states = self._staging
            self._run_batch(item.batch, states)
        if item.is_last:
            elapsed_s = time.perf_counter() - self._unit_started_at
            self._writers.submit(unit_input, states, elapsed_s=elapsed_s)

    def finish(self) -> None:
        """Wait for the copies that are under way."""
        self._wait_until(0)
        self.elapsed_s = time.perf_counter() - self._started_at

    def _run_batch(self, batch: Batch, staging: Staging) -> None:
        pilot = self._plan.pilot if self._plan.is_piloted else None
        started_at = time.perf_counter()
        copy = staging.add(batch, capture(self._base, self._taps, torch.from_numpy(batch.ids)))
        if copy is None:
            self._progress.update(len(batch.rows))
        else:
            self._waiting.append((batch, copy))
            self._wait_until(_COPIES_AHEAD if pilot is None else 0)
        if pilot is not None:
            seconds = time.perf_counter() - started_at
            timed = TimedBatch.of(batch.lengths, seconds=seconds)
            pilot.add(staging.newest(len(batch.rows)), batch.rows, timed)

    @property
    def _taps(self) -> list[str]:
        return self._plan.manifest.taps

    def _wait_until(self, most: int) -> None:
        """Wait until at most `most` batches are under way: the GPU is that far behind the host."""
        while len(self._waiting) > most:
            batch, copy = self._waiting.popleft()
            copy.wait()
            self._progress.update(len(batch.rows))

    def _run_unit(self, unit_input: UnitInput) -> dict[str, NDArray[Any]]:
        """Return the states of a unit that is not run in batches of samples."""
        plan = self._plan
        if plan.states_of is not None:
            return plan.states_of(unit_input, self._progress)
        num_nodes = plan.read_tokens[plan.inputs.samples(unit_input.unit)]
        trees = read_trees(
            plan.root,
            plan.manifest,
            unit_input.unit,
            num_nodes=num_nodes,
            starts=unit_input.starts,
            lengths=unit_input.lengths,
        )
        return compute_aligned_states(
            self._base,
            self._taps,
            trees,
            num_nodes,
            keeps_bits=keeps_bits(plan.manifest),
            batch_tokens=plan.batch_tokens,
            progress=self._progress,
            pilot=plan.pilot if plan.is_piloted else None,
        )

    def _show_limit(self) -> None:
        """Show what is written, and which stage was the limit since the unit before."""
        receipts = self._writers.receipts
        for receipt in receipts[self._known :]:
            self._stored_bytes += stored_bytes(self._plan.manifest, receipt)
        self._known = len(receipts)
        waited_s, elapsed_s = self.waited_s, time.perf_counter() - self._started_at
        before, before_s = self._before
        self._before = (waited_s, elapsed_s)
        since = {stage: seconds - before[stage] for stage, seconds in waited_s.items()}
        limit = limiting_stage(since, elapsed_s - before_s)
        self._progress.note = f"{self._stored_bytes / 1e6:,.0f} MB written, limit: {limit}"


def keeps_bits(manifest: Manifest) -> bool:
    """Return whether a store keeps states as bits of bfloat16."""
    return not manifest.is_lossy and bool(manifest.settings["dtype"] == "bfloat16")


def _stager(manifest: Manifest, base: Base) -> Callable[[], Staging]:
    """Return what makes memory for the states of a unit; all is filled by the same streams."""
    return partial(
        Staging,
        manifest.taps,
        num_rows=manifest.unit_tokens,
        width=manifest.width,
        keeps_bits=keeps_bits(manifest),
        streams=SideStreams() if base.device.type == "cuda" else None,
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
) -> dict[str, NDArray[Any]]:
    """Run the base over one unit, at most `batch_tokens` tokens (pads included) at a time.

    Returns:
        For each tap [R, D]: uint16 bits of bfloat16 if `keeps_bits`, else float32. Rows that
        belong to no sample are 0.
    """
    staging = Staging(
        taps,
        num_rows=len(unit.tokens),
        width=base.identity.width,
        keeps_bits=keeps_bits,
        streams=SideStreams() if base.device.type == "cuda" else None,
    )
    waiting: deque[SideCopy] = deque()
    for samples in plan_batches(unit.lengths, batch_tokens=batch_tokens):
        batch = batch_of(unit, samples)
        copy = staging.add(batch, capture(base, taps, torch.from_numpy(batch.ids)))
        if copy is not None:
            waiting.append(copy)
        if len(waiting) > _COPIES_AHEAD:
            waiting.popleft().wait()
    return {tap: rows[:] for tap, rows in staging.rows(unit.num_tokens).items()}
