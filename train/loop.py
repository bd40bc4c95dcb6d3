"""A run of training: steps, evaluations, checkpoints, and the finished carry-on at its end.

The same command begins a run, goes on with it after a kill, and repeats it: on the same CPU with
the same number of threads a resumed run ends with the same bits as one that was never stopped.
The only place that knows time.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from carryon.cache.atomic import write_json
from carryon.cache.errors import InputError
from carryon.cache.reader import Store
from carryon.train.batch import Batch
from carryon.train.carryon import num_parameters
from carryon.train.carryon_folder import CarryOnCard, save_carryon
from carryon.train.checkpoint import (
    Progress,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
)
from carryon.train.evaluate import Nll, check_taps, measure_nll, stream_taps
from carryon.train.interrupt import StopRequest
from carryon.train.metrics import Meter, append_metrics, read_metrics, rewind_metrics
from carryon.train.order import count_steps
from carryon.train.plots import plot_curves
from carryon.train.report import TrainReport
from carryon.train.run import Run, TrainSettings, prepare_run, split_store
from carryon.train.run_folder import library_versions, open_run_folder, run_identity
from carryon.train.schedule import learning_rate
from carryon.train.step import NotFiniteError, StepFigures, take_step
from carryon.train.stream import Stream, stream_bytes

START = Progress(step=0, epoch=0, step_in_epoch=0, tokens=0, targets=0, elapsed_s=0.0, wait_s=0.0)
NAMED_SAMPLES = 5
"""Samples that an error names, at most."""


def train(
    *,
    store: str,
    out: str,
    carryon: CarryOnSettings,
    optimization: OptimizationSettings,
    stream: StreamSettings,
    loss: LossSettings,
    run: RunSettings,
) -> TrainReport:
    """Fit a carry-on to a store and leave it in `out`/carryon.

    If `out` holds an unfinished run of the same store and settings, it goes on from its newest
    checkpoint; of a finished one the report is returned.

    Args:
        store: folder of the store.
        out: the run folder (run_folder.py says what is in it).
        carryon: shape of the carry-on.
        optimization: how its weights are found.
        stream: how the store is read.
        loss: how the head is multiplied.
        run: where it computes, when it evaluates and saves.

    Raises:
        InputError: a setting does not fit the store, `out` holds something else, or the loss is
            no longer finite. Checkpoints written before stay.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written, and the same command goes on.
    """
    settings = TrainSettings(
        carryon=carryon, optimization=optimization, stream=stream, loss=loss, run=run
    )
    opened = Store.open(store)
    check_taps(opened, carryon.taps)
    split = split_store(settings, opened)
    config = {"store": store, "out": out, **settings.to_flat()}
    identity = run_identity(store_fingerprint=opened.fingerprint, config=config)
    folder = open_run_folder(out, identity=identity, config=config)
    if folder.result.exists():
        _say(f"{out}: this run is finished")
        return TrainReport(**json.loads(folder.result.read_text(encoding="ascii")))
    prepared = prepare_run(settings, opened, split, folder=folder, identity=identity)
    _say(_summary(prepared))
    with StopRequest() as stop:
        progress = _take_steps(prepared, _begin(prepared), stop)
    return _finish(prepared, progress)


def _begin(run: Run) -> Progress:
    """Load the newest checkpoint, or measure the base where there is none."""
    newest = newest_checkpoint(run.folder.checkpoints)
    if newest is not None:
        progress = load_checkpoint(
            newest, carryon=run.carryon, optimizer=run.optimizer, identity=run.identity
        )
        rewind_metrics(run.folder.metrics, step=progress.step)
        _say(f"going on from step {progress.step} of {run.num_steps}")
        return progress
    rewind_metrics(run.folder.metrics, step=-1)
    base = _measure(run, _sampled(run), with_base=True, with_carryon=False).base
    append_metrics(run.folder.metrics, {"step": 0, "epoch": 0, "held_out_nll": base})
    return START


def _take_steps(run: Run, progress: Progress, stop: StopRequest) -> Progress:
    stream = Stream(
        run.store,
        run.windows_from(progress.epoch, progress.step_in_epoch),
        taps=stream_taps(run.settings.carryon.taps),
        settings=run.settings.stream,
        is_pinned=run.device.type == "cuda",
    )
    bar = tqdm(total=run.num_steps, initial=progress.step, desc="train", unit="step")
    meter = Meter(progress)
    with stream, bar:
        steps = iter(stream)
        while progress.step < run.num_steps:
            progress, figures = _timed_step(run, progress, stream, steps)
            meter.add(figures)
            bar.update()
            is_stopping = stop.is_set
            due = _due(run, progress, is_stopping=is_stopping)
            if due.is_logged:
                line = meter.line(progress, learning_rate=_rate(run, progress.step - 1))
                append_metrics(run.folder.metrics, line)
                bar.set_postfix(loss=line["loss"], tokens_per_s=round(line["tokens_per_second"]))
            if due.is_evaluated:
                nll = _measure(run, _sampled(run), with_base=False, with_carryon=True).carryon
                line = {"step": progress.step, "epoch": progress.epoch, "held_out_nll": nll}
                append_metrics(run.folder.metrics, line)
            if due.is_saved:
                save_checkpoint(
                    run.folder.checkpoints,
                    carryon=run.carryon,
                    optimizer=run.optimizer,
                    progress=progress,
                    identity=run.identity,
                    keep=run.settings.run.keep_checkpoints,
                )
            if is_stopping:
                raise KeyboardInterrupt(
                    f"stopped after step {progress.step} of {run.num_steps}, a checkpoint is "
                    "written: run the same command to go on"
                )
    return progress


def _timed_step(
    run: Run, progress: Progress, stream: Stream, steps: Iterator[list[Batch]]
) -> tuple[Progress, StepFigures]:
    started_at, waited_s = time.perf_counter(), stream.wait_s
    batches = next(steps)
    try:
        figures = take_step(
            run.carryon,
            run.optimizer,
            batches,
            head=run.head,
            chunk=run.chunk,
            learning_rate=_rate(run, progress.step),
            grad_clip=run.settings.optimization.grad_clip,
        )
    except NotFiniteError as error:
        raise _not_finite(run, progress, error) from error
    is_end_of_epoch = progress.step_in_epoch + 1 == count_steps(run.epochs[progress.epoch])
    return Progress(
        step=progress.step + 1,
        epoch=progress.epoch + is_end_of_epoch,
        step_in_epoch=0 if is_end_of_epoch else progress.step_in_epoch + 1,
        tokens=progress.tokens + figures.tokens,
        targets=progress.targets + figures.targets,
        elapsed_s=progress.elapsed_s + time.perf_counter() - started_at,
        wait_s=progress.wait_s + stream.wait_s - waited_s,
    ), figures


@dataclass(frozen=True, kw_only=True, slots=True)
class _Due:
    is_logged: bool
    is_evaluated: bool
    is_saved: bool


def _due(run: Run, progress: Progress, *, is_stopping: bool) -> _Due:
    """Say what follows a step. The end of the run is evaluated by `_finish`, as saved."""
    is_last = progress.step == run.num_steps
    settings = run.settings.run
    is_saved = is_last or is_stopping or _is_turn(settings.checkpoint_every, progress)
    return _Due(
        is_logged=is_saved or progress.step % settings.log_every == 0,
        is_evaluated=not is_last and _is_turn(settings.evaluate_every, progress),
        is_saved=is_saved,
    )


def _is_turn(every: int, progress: Progress) -> bool:
    return progress.step % every == 0 if every else progress.step_in_epoch == 0


def _rate(run: Run, step: int) -> float:
    return learning_rate(step, num_steps=run.num_steps, settings=run.settings.optimization)


def _finish(run: Run, progress: Progress) -> TrainReport:
    """Round the weights as they will be saved, evaluate, and write carry-on, plot and report."""
    dtype = torch.bfloat16 if run.settings.run.saved_dtype == "bfloat16" else torch.float32
    with torch.no_grad():
        for weight in run.carryon.parameters():
            weight.copy_(weight.to(dtype))
    nll = _measure(run, run.split.held_out, with_base=True, with_carryon=True)
    append_metrics(
        run.folder.metrics,
        {"step": progress.step, "epoch": progress.epoch, "held_out_nll": nll.carryon},
    )
    carryon_bytes = save_carryon(run.folder.carryon, run.carryon, _card(run, nll), dtype=dtype)
    plot_curves(read_metrics(run.folder.metrics), run.folder.curves)
    report = _report(run, progress, nll, carryon_bytes=carryon_bytes)
    write_json(run.folder.result, report.to_dict())
    return report


def _card(run: Run, nll: Nll) -> CarryOnCard:
    figures = {
        "held_out_nll_of_base": round(nll.base, 4),
        "held_out_nll_of_carry_on": round(nll.carryon, 4),
        "held_out_samples": nll.samples,
        "held_out_tokens": nll.targets,
        "epochs": run.settings.optimization.epochs,
        "steps": run.num_steps,
    }
    return CarryOnCard(
        settings=run.settings.carryon.to_dict(),
        base_width=run.store.width,
        base=run.store.manifest.base,
        store_fingerprint=run.store.fingerprint,
        split={
            "held_out_share": run.settings.stream.held_out_share,
            "seed": run.settings.optimization.seed,
        },
        alpha=1.0,
        figures=figures,
        versions=library_versions(),
    )


def _report(run: Run, progress: Progress, nll: Nll, *, carryon_bytes: int) -> TrainReport:
    return TrainReport(
        out=str(run.folder.root),
        carryon=str(run.folder.carryon),
        num_parameters=num_parameters(run.carryon),
        carryon_bytes=carryon_bytes,
        num_steps=run.num_steps,
        num_tokens=progress.tokens,
        num_targets=progress.targets,
        train_s=round(progress.elapsed_s, 3),
        tokens_per_second=round(progress.tokens / progress.elapsed_s, 1),
        data_wait_share=round(progress.wait_s / progress.elapsed_s, 4),
        held_out_samples=nll.samples,
        held_out_targets=nll.targets,
        base_nll=nll.base,
        carryon_nll=nll.carryon,
        base_perplexity=math.exp(nll.base),
        carryon_perplexity=math.exp(nll.carryon),
    )


def _measure(run: Run, samples: NDArray[np.int64], *, with_base: bool, with_carryon: bool) -> Nll:
    return measure_nll(
        run.store,
        samples,
        carryon=run.carryon,
        head=run.head,
        chunk=run.chunk,
        alpha=1.0,
        stream=run.settings.stream,
        with_base=with_base,
        with_carryon=with_carryon,
    )


def _sampled(run: Run) -> NDArray[np.int64]:
    """Return the held-out samples of an evaluation during the run."""
    held_out = run.split.held_out
    tokens = np.cumsum(run.store.sample_lengths[held_out])
    return held_out[: max(1, int((tokens <= run.settings.run.evaluate_tokens).sum()))]


def _not_finite(run: Run, progress: Progress, error: NotFiniteError) -> InputError:
    ids = [run.store.sample_id(sample) for sample in error.samples[:NAMED_SAMPLES]]
    more = len(error.samples) - len(ids)
    newest = newest_checkpoint(run.folder.checkpoints)
    return InputError(
        f"{run.folder.root}: step {progress.step + 1}: expected a finite loss and gradient, got "
        f"nan or infinity in the samples {', '.join(ids)}{f' and {more} more' if more else ''}: "
        "look at them, or begin again with a lower learning_rate in another --out; "
        f"last good checkpoint: {newest.name if newest else 'none'}"
    )


def _summary(run: Run) -> str:
    train, lengths = run.split.train, run.store.sample_lengths
    memory = stream_bytes(
        run.store,
        taps=stream_taps(run.settings.carryon.taps),
        settings=run.settings.stream,
        batch_tokens=run.settings.optimization.batch_tokens,
    )
    return (
        f"train on {len(train)} samples, {int(lengths[train].sum())} tokens; "
        f"{len(run.split.held_out)} samples held out\n"
        f"{run.settings.optimization.epochs} epochs, {run.num_steps} steps; "
        f"{num_parameters(run.carryon)} weights to train; on {run.device}, head in "
        f"{str(run.head.weight.dtype).removeprefix('torch.')}; at most {memory / 1e6:.0f} MB of "
        f"hidden states in memory\n"
        f"settings: {run.folder.config}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)
