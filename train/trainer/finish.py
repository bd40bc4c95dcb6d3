"""The end of runs: weights rounded as saved, evaluated, and written with card, plot and report."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from carryon.cache.files import write_json
from carryon.train.modules.carryon import num_parameters
from carryon.train.modules.serialization import CarryOnCard, save_carryon
from carryon.train.plots import plot_curves
from carryon.train.trainer.checkpoint import best_checkpoint, load_weights
from carryon.train.trainer.distributed import Processes, wait_for_all
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.nll import Nll, measure_nlls, null_if_nan, shown_nll
from carryon.train.trainer.run import Run
from carryon.train.trainer.run_dir import library_versions
from carryon.train.trainer.run_state import RunState


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """The figures of a run; `RUN/result.json` holds them."""

    out: str
    """The run folder."""
    carryon: str
    """Folder of the finished carry-on."""
    num_parameters: int
    """Trained values."""
    carryon_bytes: int
    """Size of the carry-on's weights as saved."""
    num_steps: int
    """Steps taken."""
    num_tokens: int
    """Tokens trained on, all epochs."""
    num_targets: int
    """Supervised tokens trained on, all epochs."""
    train_s: float
    """Seconds of steps, without evaluations and checkpoints."""
    tokens_per_second: float
    """num_tokens / train_s."""
    data_wait_ratio: float
    """Part of train_s spent waiting for data."""
    held_out_samples: int
    """Samples kept for evaluation."""
    held_out_targets: int
    """Their supervised tokens."""
    base_nll: float
    """Of the held-out samples, in nats per supervised token."""
    carryon_nll: float
    """The same with the carry-on, weights rounded as saved."""
    base_perplexity: float
    """exp(base_nll)."""
    carryon_perplexity: float
    """exp(carryon_nll)."""
    held_out_contamination: float
    """Share of the held-out targets whose last 32 tokens stand in the training half too."""
    finished_with_step: int
    """Step whose weights the carry-on has: the last, or the one with the best held-out loss."""
    base_nll_se: float | None = None
    """Standard error of base_nll, clustered by sample (trainer/nll.py has the formula)."""
    carryon_nll_se: float | None = None
    """Standard error of carryon_nll."""
    nll_difference_se: float | None = None
    """Standard error of carryon_nll - base_nll, which are measured on the same targets."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def summary(self) -> str:
        """Return one line for people."""
        return (
            f"{self.carryon}: {self.carryon_bytes / 1e6:.2f} MB, trained in {self.train_s:,.0f} s "
            f"({self.tokens_per_second:,.0f} tokens/s); held-out NLL of the base "
            f"{shown_nll(self.base_nll, self.base_nll_se)}, with the carry-on "
            f"{shown_nll(self.carryon_nll, self.carryon_nll_se)} on {self.held_out_targets:,} "
            "targets"
        )


def finish_runs(lives: Sequence[RunState], processes: Processes) -> list[TrainReport]:
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
        [live.run.eval_job(with_base=True, with_carryon=True) for live in lives],
        stream=data.settings,
    )
    reports = []
    for live, nll, step in zip(lives, nlls, steps, strict=True):
        live.record_result(nll)
        reports.append(_report(live, nll, finished_with_step=step))
        if processes.is_first:
            _write(live.run, nll, reports[-1])
    wait_for_all()
    return reports


def _choose_weights(live: RunState) -> int:
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
        "held_out_nll_standard_error": null_if_nan(round(nll.carryon_se, 4)),
        "held_out_samples": nll.samples,
        "held_out_tokens": nll.targets,
        "held_out_contamination": report.held_out_contamination,
        "epochs": run.settings.optimization.epochs,
        "steps": report.finished_with_step,
    }
    return CarryOnCard(
        settings=run.settings.carryon.to_dict(),
        base_width=run.store.width,
        base=run.store.base,
        store_fingerprint=run.store.fingerprint,
        split={
            "held_out_ratio": run.settings.stream.held_out_ratio,
            "seed": run.settings.stream.data_seed,
            "stores": [*(run.segment.seen if run.segment else ()), *run.data.fingerprints],
        },
        alpha=1.0,
        figures=figures,
        versions=library_versions(),
    )


def _report(live: RunState, nll: Nll, *, finished_with_step: int) -> TrainReport:
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
        data_wait_ratio=round(progress.wait_s / progress.elapsed_s, 4),
        held_out_samples=nll.samples,
        held_out_targets=nll.targets,
        base_nll=nll.base,
        carryon_nll=nll.carryon,
        base_nll_se=null_if_nan(nll.base_se),
        carryon_nll_se=null_if_nan(nll.carryon_se),
        nll_difference_se=null_if_nan(nll.difference_se),
        base_perplexity=math.exp(nll.base),
        carryon_perplexity=math.exp(nll.carryon),
        held_out_contamination=round(run.contamination.share, 4),
        finished_with_step=finished_with_step,
    )
