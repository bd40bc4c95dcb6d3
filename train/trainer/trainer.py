"""Training: from what is asked for to the finished carry-on, one run or several side by side.

The same command begins runs, goes on with them after a kill, and repeats them: on the same CPU
with the same number of threads a resumed run ends with the same bits as one that was never
stopped, and a run beside others with the same bits as one alone.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from carryon.cache.device import pick_device
from carryon.cache.errors import InputError
from carryon.cache.files import write_json
from carryon.cache.store.view import StoreLike
from carryon.train.config import LossSettings, TrainSettings, rate_warning
from carryon.train.data.contamination import NGRAM, WARN_ABOVE, Contamination, measure_contamination
from carryon.train.data.datasets import TrainData, open_data
from carryon.train.data.loader import stream_bytes
from carryon.train.data.split import sample_units
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.modules.carryon import num_parameters
from carryon.train.trainer.distributed import (
    Processes,
    join_processes,
    wait_for_all,
)
from carryon.train.trainer.engine import measure_base, run_engine
from carryon.train.trainer.finish import TrainReport, finish_runs
from carryon.train.trainer.interrupt import StopRequest
from carryon.train.trainer.nll import warn_if_few
from carryon.train.trainer.run import Run, prepare_run
from carryon.train.trainer.run_dir import RunFolder, open_run_folder, run_identity
from carryon.train.trainer.run_state import RunState
from carryon.train.trainer.segment import Segment

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run that is asked for."""

    out: str
    """The run folder (run_folder.py says what is in it)."""
    settings: TrainSettings
    segment: Segment | None = None
    """What it takes of the order of the data, and from where. None: all, from the start."""


StorePaths = str | Path | Sequence[str | Path]
"""The folder of a store, or the folders of several."""


def store_paths(store: StorePaths) -> list[str]:
    """Return the folders that a call names."""
    return [str(store)] if isinstance(store, (str, Path)) else [str(path) for path in store]


def train(
    store: StorePaths,
    *,
    out: str | Path,
    settings: TrainSettings | None = None,
    **options: Any,  # noqa: ANN401 -- each setting has its own type
) -> TrainReport:
    """Train a carry-on from a store, or from several, and write it to `out`/carryon.

    An unfinished run of the same store and settings in `out` is resumed from its newest
    checkpoint; of a finished one the report is returned.

    Example:
        report = train("store", out="run", learning_rate=1e-3, epochs=5)

    Args:
        store: folder of the store, or of each store.
        out: the run folder (run_dir.py lists its files); made if missing.
        settings: of the run. None: the defaults.
        options: fields of TrainSettings' groups by name, changed in `settings`.

    Raises:
        InputError: a setting is unknown or does not fit the store, `out` holds something else, or
            the loss is no longer finite. Checkpoints written before stay.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written, and the same call resumes.
    """
    settings = (settings or TrainSettings()).with_options(**options)
    [report] = train_jointly(store_paths(store), [Job(out=str(out), settings=settings)])
    return report


def train_jointly(
    paths: Sequence[str],
    jobs: Sequence[Job],
    *,
    wrap_store: Callable[[StoreLike], StoreLike] | None = None,
) -> list[TrainReport]:
    """Train all runs from one read of the data, side by side; one is the case of one.

    Args:
        paths: folders of the stores.
        jobs: runs of the same StreamSettings, on the same device.
        wrap_store: wraps the opened store that the runs read, to measure reading.

    Raises:
        InputError, KeyboardInterrupt: as `train`; every run keeps what it had.
    """
    processes = join_processes(jobs[0].settings.run.device)
    data, prepared = _open(paths, jobs, processes, wrap_store)
    finished = {job.out: _finished(job.out) for job in jobs}
    _check_processes(prepared, processes)
    lives = [RunState(run, processes) for run in prepared]
    with StopRequest() as stop:
        measure_base([live for live in lives if live.is_new])
        run_engine(data, lives, processes, stop)
    reports = {report.out: report for report in finish_runs(lives, processes)}
    return [finished[job.out] or reports[str(Path(job.out))] for job in jobs]


def train_segments(paths: Sequence[str], jobs: Sequence[Job]) -> None:
    """Train segments of paths side by side, up to the checkpoints that they end with.

    Nothing is evaluated and no carry-on is written. After a kill the same call goes on.

    Args:
        paths: folders of the stores.
        jobs: runs of the same StreamSettings, on the same device.

    Raises:
        InputError, KeyboardInterrupt: as `train`; every run keeps what it had.
    """
    processes = join_processes(jobs[0].settings.run.device)
    data, prepared = _open(paths, jobs, processes, None)
    lives = [RunState(run, processes) for run in prepared]
    with StopRequest() as stop:
        run_engine(data, lives, processes, stop)


def _open(
    paths: Sequence[str],
    jobs: Sequence[Job],
    processes: Processes,
    wrap_store: Callable[[StoreLike], StoreLike] | None,
) -> tuple[TrainData, list[Run]]:
    """Check everything, then begin or find the run folders; returns the runs to be done."""
    first = jobs[0].settings
    data = open_data(paths, first)
    if wrap_store is not None:
        data = replace(data, store=wrap_store(data.store))
    contamination = _overlap(data, jobs)
    jobs = [replace(job, settings=data.resolve(job.settings)) for job in jobs]
    identities = [_identity(data, job) for job in jobs]
    pick_device(first.run.device)
    heads: dict[LossSettings, FrozenHead] = {}
    runs = []
    for job, identity in zip(jobs, identities, strict=True):
        folder = RunFolder(root=Path(job.out))
        if processes.is_first:
            config = {"store": list(paths), "out": job.out, **job.settings.to_flat()}
            open_run_folder(job.out, identity=identity, config=config)
            write_json(folder.contamination, contamination.to_dict())
        wait_for_all()
        if folder.result.exists():
            if processes.is_first:
                logger.info(f"{job.out}: this run is finished")
            continue
        run = prepare_run(
            job.settings,
            data,
            folder=folder,
            identity=identity,
            contamination=contamination,
            heads=heads,
            segment=job.segment,
        )
        if processes.is_first:
            logger.info(_summary(run))
            if warning := rate_warning(run.settings.optimization, run.settings.carryon):
                logger.warning(warning)
        runs.append(run)
    if runs and processes.is_first:
        warn_if_few(contamination.held_out_targets)
    if runs and processes.is_first and contamination.share > WARN_ABOVE:
        logger.warning(
            f"{contamination.share:.0%} of the held-out targets, with the {NGRAM} tokens "
            "up to them, also stand in the training half: the held-out loss rewards memorizing. "
            "Fix: split by document, or mark the held-out samples yourself"
        )
    return data, runs


def _check_processes(runs: Sequence[Run], processes: Processes) -> None:
    for run in runs:
        if processes.size > 1 and run.settings.memory.step_in_backward:
            raise InputError(
                "step_in_backward: expected no with several processes, whose gradients are summed "
                "first, got yes"
            )


def _overlap(data: TrainData, jobs: Sequence[Job]) -> Contamination:
    """Return what was measured when the first of the runs began, or measure it."""
    for job in jobs:
        path = RunFolder(root=Path(job.out)).contamination
        if path.exists():
            return Contamination(**json.loads(path.read_text(encoding="ascii")))
    found = measure_contamination(data.store, data.split, units=sample_units(data.store))
    for half, targets in (("train on", found.train_targets), ("hold out", found.held_out_targets)):
        if not targets:
            raise InputError(
                f"{data.store.root}: no supervised token in the samples to {half}: look at the "
                "loss mask, or give another held_out_ratio or data_seed"
            )
    return found


def _identity(data: TrainData, job: Job) -> dict[str, object]:
    resolved: dict[str, object] = {"window_units": data.settings.window_units}
    if job.segment is not None:
        resolved |= job.segment.identity()
    return run_identity(
        store_fingerprint=data.store.fingerprint,
        config=job.settings.to_flat() | resolved,
        is_decided_by_evaluations=job.settings.run.finishes_with_best
        or job.settings.run.patience > 0,
    )


def _finished(out: str) -> TrainReport | None:
    path = RunFolder(root=Path(out)).result
    if not path.exists():
        return None
    return TrainReport(**json.loads(path.read_text(encoding="ascii")))


def _summary(run: Run) -> str:
    train, lengths = run.data.split.train, run.store.sample_lengths
    memory = stream_bytes(run.store, run.windows, taps=run.taps)
    return (
        f"train on {len(train)} samples, {int(lengths[train].sum())} tokens; "
        f"{len(run.data.split.held_out)} samples held out\n"
        f"{run.settings.optimization.epochs} epochs, {run.num_steps} steps; "
        f"{num_parameters(run.carryon)} weights to train; on {run.head.device}, head in "
        f"{str(run.head.dtype).removeprefix('torch.')}; at most {memory / 1e6:.0f} MB of "
        f"hidden states in memory\n"
        f"settings: {run.folder.config}"
    )
