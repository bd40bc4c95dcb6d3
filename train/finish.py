"""The end of runs: weights rounded as saved, evaluated, and written with card, plot and report."""

import math
from collections.abc import Sequence

import torch

from carryon.cache.atomic import write_json
from carryon.train.carryon import num_parameters
from carryon.train.carryon_folder import CarryOnCard, save_carryon
from carryon.train.checkpoint import best_checkpoint, load_weights
from carryon.train.evaluate import Nll, measure_nlls
from carryon.train.live_run import LiveRun
from carryon.train.metrics import read_metrics
from carryon.train.plots import plot_curves
from carryon.train.processes import Processes, wait_for_all
from carryon.train.report import TrainReport
from carryon.train.run import Run
from carryon.train.run_folder import library_versions


def finish_runs(lives: Sequence[LiveRun], processes: Processes) -> list[TrainReport]:
    """Write the carry-ons of runs whose last step is taken; all evaluated in one pass.

    A run is finished once its report is written, which comes last: after a kill before that the
    same command finishes it from its last checkpoint.
    """
    if not lives:
        return []
    wait_for_all()  # the first process may still be writing the best checkpoint
    steps = [_choose_weights(live) for live in lives]
    for live in lives:
        _round_(live.run)
    data = lives[0].run.data
    nlls = measure_nlls(
        data.store,
        data.split.held_out,
        [live.run.judged(with_base=True, with_carryon=True) for live in lives],
        stream=data.settings,
    )
    reports = []
    for live, nll, step in zip(lives, nlls, steps, strict=True):
        live.take_result(nll.carryon)
        reports.append(_report(live, nll, finished_with_step=step))
        if processes.is_first:
            _write(live.run, nll, reports[-1])
    wait_for_all()
    return reports


def _choose_weights(live: LiveRun) -> int:
    """Put the weights that the carry-on is to have into place; returns their step."""
    run, progress = live.run, live.progress
    best = best_checkpoint(run.folder.checkpoints, progress)
    if not run.settings.run.finishes_with_best or best is None:
        return progress.step
    load_weights(best, run.carryon)
    return progress.best_step


def _round_(run: Run) -> None:
    with torch.no_grad():
        for weight in run.carryon.state_dict().values():  # what is saved; all else is the base's
            weight.copy_(weight.to(_saved_dtype(run)))


def _saved_dtype(run: Run) -> torch.dtype:
    return torch.bfloat16 if run.settings.run.saved_dtype == "bfloat16" else torch.float32


def _write(run: Run, nll: Nll, report: TrainReport) -> None:
    card = _card(run, nll, report)
    save_carryon(run.folder.carryon, run.carryon, card, dtype=_saved_dtype(run))
    plot_curves(read_metrics(run.folder.metrics), run.folder.curves)
    write_json(run.folder.result, report.to_dict())


def _card(run: Run, nll: Nll, report: TrainReport) -> CarryOnCard:
    figures = {
        "held_out_nll_of_base": round(nll.base, 4),
        "held_out_nll_of_carry_on": round(nll.carryon, 4),
        "held_out_samples": nll.samples,
        "held_out_tokens": nll.targets,
        "held_out_overlap": report.held_out_overlap,
        "epochs": run.settings.optimization.epochs,
        "steps": report.finished_with_step,
    }
    return CarryOnCard(
        settings=run.settings.carryon.to_dict(),
        base_width=run.store.width,
        base=run.store.manifest.base,
        store_fingerprint=run.store.fingerprint,
        split={
            "held_out_share": run.settings.stream.held_out_share,
            "seed": run.settings.stream.data_seed,
            "stores": [*(run.piece.seen if run.piece else ()), *run.data.fingerprints],
        },
        alpha=1.0,
        figures=figures,
        versions=library_versions(),
    )


def _report(live: LiveRun, nll: Nll, *, finished_with_step: int) -> TrainReport:
    run, progress = live.run, live.progress
    weights = run.carryon.state_dict().values()
    return TrainReport(
        out=str(run.folder.root),
        carryon=str(run.folder.carryon),
        num_parameters=num_parameters(run.carryon),
        carryon_bytes=sum(weight.numel() for weight in weights) * _saved_dtype(run).itemsize,
        num_steps=progress.step,
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
        held_out_overlap=round(run.overlap.share, 4),
        finished_with_step=finished_with_step,
    )
