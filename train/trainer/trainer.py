"""Train carry-ons: one run, or several side by side from one read of the data.

The same call starts runs, resumes them after a kill and repeats them. On the same CPU with the
same number of threads a resumed run ends with the same bits as one that was never stopped, and a
run beside others with the same bits as one alone that has the same `loss_way` and `compile`.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from carryon.cache.device import pick_device
from carryon.cache.errors import DamagedFileError, InputError
from carryon.cache.files.documents import sealed, write_json
from carryon.cache.store.view import StoreLike
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    OptimizationSettings,
    TrainSettings,
    rates_of,
)
from carryon.train.data.contamination import NGRAM, WARN_ABOVE, Contamination, measure_contamination
from carryon.train.data.datasets import (
    StorePaths,
    TrainData,
    open_data,
    store_paths,
    window_units,
)
from carryon.train.data.loader import stream_bytes
from carryon.train.kinds import get_kind
from carryon.train.losses.base_states import get_base_states
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.ways import way_of, ways_of
from carryon.train.mixing.projected import ProjectedSources, project_sources
from carryon.train.mixing.sources import Source, join_states, open_sources, warn_about_sources
from carryon.train.modules.carryon import num_parameters
from carryon.train.modules.serialization import read_weights
from carryon.train.modules.taps import resolve_taps, stream_taps
from carryon.train.trainer.choices import choose_products, keep_evaluated
from carryon.train.trainer.compilation.choice import choose_compilation
from carryon.train.trainer.distributed import (
    Processes,
    join_processes,
    wait_for_all,
)
from carryon.train.trainer.engine import (
    measure_base,
    raise_callback_errors,
    run_engine,
    stop_on_signal,
)
from carryon.train.trainer.finish import TrainReport, finish_runs, read_reports
from carryon.train.trainer.held_out.nll import warn_if_few
from carryon.train.trainer.metrics import Callback, Scoring
from carryon.train.trainer.run import Job, Run, prepare_run
from carryon.train.trainer.run_dir import (
    RunFolder,
    open_run_folder,
    open_to_write,
)
from carryon.train.trainer.run_documents import read_values
from carryon.train.trainer.run_state import RunState

logger = logging.getLogger(__name__)


def train(
    store: StorePaths,
    *,
    out: str | Path,
    settings: TrainSettings | None = None,
    module: nn.Module | None = None,
    callbacks: Sequence[Callback] = (),
    scoring: Scoring | None = None,
    **options: Any,  # noqa: ANN401
) -> TrainReport:
    """Train a carry-on from a store, or from several, and write it to `out`/carryon.

    An unfinished run of the same store and settings in `out` is resumed from its newest
    checkpoint; of a finished run the report is returned.

    Example:
        report = train("store", out="run", learning_rate=1e-3, epochs=5)

    Args:
        store: folder of the store or an open store, or several of them.
        out: the run folder (run_dir.py lists its files); made if missing.
        settings: of the run. None: the defaults.
        module: your own module to train in place; None: one of the settings' kind. It needs the
            methods `correct_packed` and `customize` as modules/carryon.py documents them, and
            `taps` (an option) names the states that it reads. Its state_dict is saved in
            `out`/carryon/carryon.safetensors and in checkpoints. After the call it holds the
            saved weights; to load them elsewhere, pass that file to its load_state_dict, or add
            its kind with register_kind.
        callbacks: called with each line of metrics.jsonl, evaluations too, as a dict. An exception
            of one stops the run after the step, saves a checkpoint and is raised.
        scoring: scores the carry-on every some steps, such as `open_scorer` of
            inference/scoring/scorer.py. Its exceptions act as those of callbacks.
        options: fields of TrainSettings' groups by name, changed in `settings`.

    Raises:
        InputError: a setting is unknown or does not fit the store, `out` holds something else, or
            the loss is not finite. Checkpoints written before stay.
        StoreBusyError: another process trains in `out`.
        DiskFullError: the disk is full; the same call resumes.
        KeyboardInterrupt: Ctrl-C; a checkpoint is saved, and the same call resumes.
    """
    settings = (settings or TrainSettings()).with_options(**options)
    job = Job(out=str(out), settings=settings, module=module, callbacks=callbacks, scoring=scoring)
    [report] = train_jointly(store_paths(store), [job])
    return report


def train_jointly(
    paths: Sequence[str],
    jobs: Sequence[Job],
    *,
    wrap_store: Callable[[StoreLike], StoreLike] | None = None,
) -> list[TrainReport]:
    """Train all runs side by side from one read of the data.

    Args:
        paths: folders of the stores.
        jobs: runs of the same StreamSettings, on the same device.
        wrap_store: wraps the opened store, to measure reading.

    Raises:
        InputError, KeyboardInterrupt: as `train`; every run keeps its checkpoints.
    """
    processes = join_processes(jobs[0].settings.run.device)
    with lock_runs(jobs, processes):
        reports = read_reports([job.out for job in jobs])
        data, runs = _prepare(paths, jobs, processes, wrap_store, reports)
        for run in runs:
            if processes.size > 1 and run.settings.memory.step_in_backward:
                raise InputError(
                    "step_in_backward: expected no with several processes, whose gradients are "
                    "summed first, got yes"
                )
        if runs and processes.is_first:
            warn_about_held_out(runs[0].contamination)
        states = [RunState(run, processes) for run in runs]
        with stop_on_signal() as stop:
            measure_base([state for state in states if state.is_new])
            run_engine(data, states, processes, stop)
        new = {report.out: report for report in finish_runs(states, processes)}
        raise_callback_errors(states)
        return [reports.get(job.out) or new[str(Path(job.out))] for job in jobs]


def train_segments(paths: Sequence[str], jobs: Sequence[Job]) -> None:
    """Train segments of paths side by side, up to their last checkpoints.

    Nothing is evaluated and no carry-on is written. After a kill the same call resumes.

    Args:
        paths: folders of the stores.
        jobs: runs of the same StreamSettings, on the same device.

    Raises:
        InputError, KeyboardInterrupt: as `train`; every run keeps its checkpoints.
    """
    processes = join_processes(jobs[0].settings.run.device)
    with lock_runs(jobs, processes):
        data, runs = _prepare(paths, jobs, processes, None, read_reports([job.out for job in jobs]))
        states = [RunState(run, processes) for run in runs]
        with stop_on_signal() as stop:
            run_engine(data, states, processes, stop)


@contextmanager
def lock_runs(jobs: Sequence[Job], processes: Processes) -> Iterator[None]:
    """Hold the write locks of the run folders, in the first process.

    Raises:
        StoreBusyError: another process trains in one of them.
    """
    with ExitStack() as locks:
        for job in jobs if processes.is_first else ():
            locks.enter_context(open_to_write(Path(job.out), kind="run"))
        yield


def _prepare(
    paths: Sequence[str],
    jobs: Sequence[Job],
    processes: Processes,
    wrap_store: Callable[[StoreLike], StoreLike] | None,
    reports: Mapping[str, TrainReport],
) -> tuple[TrainData, list[Run]]:
    """Check everything, then open the run folders; returns the runs that are not finished."""
    for job in jobs:
        job.settings.check_mix(is_scored=job.scoring is not None)
    data = open_data(paths, jobs[0].settings)
    data, sources = _open_mixture(data, jobs[0].settings)
    if wrap_store is not None:
        data = replace(data, store=wrap_store(data.store))
    jobs = [keep_evaluated(job.resolved(data)) for job in jobs]
    contamination = _contamination(data, jobs)
    pick_device(jobs[0].settings.run.device)
    heads: dict[LossSettings, FrozenHead] = {}
    jobs = choose_products(jobs, data.store, heads, processes)
    jobs = choose_compilation(jobs, data, contamination, processes)
    identities = [job.identity(data) for job in jobs]
    projected: ProjectedSources | None = None
    runs = []
    for job, identity in zip(jobs, identities, strict=True):
        folder = RunFolder(job.out)
        if processes.is_first:
            config = {"store": list(paths), "out": job.out, **job.settings.to_flat()}
            open_run_folder(job.out, identity=identity, config=config)
            write_json(folder.contamination, sealed(contamination.to_dict()))
        wait_for_all()
        if job.out in reports:
            if processes.is_first:
                logger.info(f"{job.out}: this run is finished")
            if job.module is not None:
                job.module.load_state_dict(read_weights(folder.carryon))
            continue
        if job.settings.mixing.has_gate and projected is None:
            projected = _project(data, sources, job, processes)
        run = prepare_run(
            job,
            data,
            identity=identity,
            contamination=contamination,
            heads=heads,
            projected=projected,
            sources=sources,
        )
        if processes.is_first:
            logger.info(f"{describe(run)}\nsettings: {run.folder.config}")
            if warning := rate_warning(run.settings.optimization, run.settings.carryon):
                logger.warning(warning)
            if warning := way_warning(run.head):
                logger.warning(warning)
            if not run.learns():
                logger.warning(
                    f"{job.out}: every step has the learning rate 0, so that nothing is learned: "
                    f"{run.num_steps} steps, of which the last has --min-lr-ratio of the peak. "
                    "Fix: more steps by a lower --tokens-per-step or more --epochs, or "
                    "--min-lr-ratio 0.1"
                )
        runs.append(run)
    return data, runs


def _open_mixture(data: TrainData, settings: TrainSettings) -> tuple[TrainData, list[Source]]:
    """Open the stores of other bases; their states, if they are read, are joined to the data."""
    mixing = settings.mixing
    if not mixing.mix:
        return data, []
    taps = mixing.mix_taps if mixing.reads_states else ()
    sources = open_sources(data.store, mixing.mix, taps=taps)
    warn_about_sources(data.store, sources)
    joined = join_states(data.store, sources)
    data = replace(
        data,
        store=joined,
        mix_fingerprints=tuple(each.store.fingerprint for each in sources),
    )
    if joined.source_widths:
        carryon = resolve_taps(settings.carryon, joined.base.get("num_layers", 0))
        read = [*stream_taps(carryon), *joined.source_widths]
        units = window_units(joined, settings.stream, taps=read)
        data = replace(data, settings=replace(data.settings, window_units=units))
    return data, sources


def _project(
    data: TrainData, sources: Sequence[Source], job: Job, processes: Processes
) -> ProjectedSources:
    """Return the projections of the sources; the first process computes what is not cached."""
    device = pick_device(job.settings.run.device)
    base = get_base_states(data.store, device=device)
    options: dict[str, Any] = {"stream": data.settings, "loss": job.settings.loss, "device": device}
    projected: ProjectedSources | None = None
    if processes.is_first:
        projected = project_sources(data.store, sources, base=base, **options)
    wait_for_all()
    return projected or project_sources(data.store, sources, base=base, **options)


def measure_halves(data: TrainData) -> Contamination:
    """Measure the halves of the data.

    Raises:
        InputError: one has no target.
    """
    measured = measure_contamination(data.store, data.split)
    halves = {"train on": measured.train_targets, "hold out": measured.held_out_targets}
    for half, targets in halves.items():
        if not targets:
            raise InputError(
                f"{data.store.root}: no supervised token in the samples to {half}. Fix: look at "
                "the loss mask, or give another --held-out-ratio or --data-seed"
            )
    return measured


def _contamination(data: TrainData, jobs: Sequence[Job]) -> Contamination:
    """Return what was measured when the first of the runs began, or measure it."""
    for job in jobs:
        path = RunFolder(job.out).contamination
        if not os.path.lexists(path):
            continue
        try:
            return read_values(Contamination, path)
        except DamagedFileError as error:
            logger.warning(f"{path}: damaged, so it is measured again: {error}")
    return measure_halves(data)


def warn_about_held_out(contamination: Contamination) -> None:
    """Warn of few held-out targets, and of those that occur in the training half."""
    warn_if_few(contamination.held_out_targets)
    if contamination.share > WARN_ABOVE:
        logger.warning(
            f"{contamination.share:.0%} of the {contamination.ngrams:,} held-out targets that can "
            f"be compared, with the {NGRAM} tokens up to them, also occur in the training half: "
            "the held-out loss rewards memorizing. Fix: "
            "extract with --column split_group=NAME of what the samples are made from, such as "
            "document or template; or mark the held-out samples yourself"
        )


def describe(run: Run) -> str:
    """Return data, steps, weights and device of a run in a few lines."""
    train_half, lengths = run.data.split.train, run.store.sample_lengths
    memory = stream_bytes(run.store, run.windows, taps=run.taps)
    cached = ""
    if run.data.decoded:
        num_bytes = run.store.num_tokens * run.store.row_bytes(run.taps)
        cached = f"decoded cache: {run.data.decoded}; all states take {num_bytes / 1e9:.3g} GB\n"
    return (
        f"train on {len(train_half)} samples, {int(lengths[train_half].sum())} tokens; "
        f"{len(run.data.split.held_out)} samples held out, {len(run.evaluated)} of them "
        f"evaluated during the run (about {run.evaluation_ratio:.0%} of the training time)\n"
        f"{run.settings.optimization.epochs} epochs, {run.num_steps} steps; "
        f"{num_parameters(run.carryon)} weights to train; on {run.head.device}, head in "
        f"{str(run.head.dtype).removeprefix('torch.')}; at most {memory / 1e6:.0f} MB of "
        f"hidden states in memory\n{cached}".rstrip()
    )


def rate_warning(optimization: OptimizationSettings, carryon: CarryOnSettings) -> str:
    """Return a warning about a learning rate that is too high for the kind; empty if it is not."""
    rate, default = optimization.learning_rate, rates_of(carryon)[0]
    if rate <= get_kind(carryon.kind).max_rate_factor * default:
        return ""
    return (
        f"learning_rate: {rate:g} is {rate / default:.0f} times the default of a {carryon.kind}"
        f"{' with LoRA' if carryon.lora_rank else ''} ({default:g}), which begins as the base and "
        "may be worse than it after a few steps. Fix: leave out --learning-rate, or lower it"
    )


def way_warning(head: FrozenHead) -> str:
    """Return a warning about a way of the loss that is given in vain; empty if it is taken."""
    if head.way == way_of(head):
        return ""
    return (
        f"loss_way: expected {', '.join(ways_of(head))} for this head on {head.device.type}, got "
        f"{head.way}: {way_of(head)} is taken. Fix: leave out --loss-way"
    )
