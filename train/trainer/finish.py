"""Finish runs: round the weights as saved, evaluate, and write carry-on, card, plot and report."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from carryon.cache.errors import CarryOnError, DamagedFileError, InputError
from carryon.cache.files.documents import FILES, read_sealed, sealed, write_json
from carryon.cache.files.tensor_files import digest_tensors
from carryon.train.data.split import part_digests
from carryon.train.mixing.mixture import MixedCarryOn, inner_carryon
from carryon.train.mixing.mixture_nll import leak_warning
from carryon.train.modules.card import CarryOnCard
from carryon.train.modules.carryon import num_parameters
from carryon.train.modules.serialization import check_carryon, save_carryon
from carryon.train.plots import plot_curves
from carryon.train.trainer.checkpoint import (
    WEIGHTS,
    best_checkpoint,
    load_weights,
    newest_checkpoint,
)
from carryon.train.trainer.distributed import Processes, wait_for_all
from carryon.train.trainer.held_out.nll import (
    Nll,
    measure_nlls,
    null_if_nan,
    perplexity_of,
    shown_nll,
)
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.run import Run
from carryon.train.trainer.run_dir import RunFolder, finished_files, library_versions
from carryon.train.trainer.run_documents import read_values
from carryon.train.trainer.run_state import RunState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainReport:
    """Summary of a finished run; `RUN/result.json` holds it."""

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
    """Tokens trained on, in all epochs."""
    num_targets: int
    """Targets trained on, in all epochs."""
    train_s: float
    """Seconds of steps, waiting for data included, without evaluations and checkpoints."""
    tokens_per_second: float
    """num_tokens / train_s."""
    data_wait_ratio: float
    """Fraction of train_s spent waiting for data."""
    held_out_samples: int
    """Held-out samples."""
    held_out_targets: int
    """Targets in the held-out samples."""
    base_nll: float
    """Loss of the base on the held-out samples, in nats per target."""
    carryon_nll: float
    """Loss with the carry-on, its weights rounded as saved."""
    base_perplexity: float
    """exp(base_nll)."""
    carryon_perplexity: float
    """exp(carryon_nll)."""
    held_out_contamination: float
    """Fraction of the held-out targets whose last 32 tokens also occur in the training half."""
    finished_with_step: int
    """Step of the carry-on's weights: the last, or that of the best held-out loss."""
    base_nll_se: float | None = None
    """Standard error of base_nll, clustered by sample; trainer/held_out/nll.py has the formula."""
    carryon_nll_se: float | None = None
    """Standard error of carryon_nll."""
    nll_difference_se: float | None = None
    """Standard error of carryon_nll - base_nll, which are measured on the same targets."""
    evaluate_s: float = 0.0
    """Seconds of evaluations during the run, that of the base included, the last one not."""
    last_evaluate_s: float = 0.0
    """Seconds of the last evaluation, of base and carry-on on all held-out samples."""
    accuracy: float | None = None
    """Fraction of right answers of the finished carry-on. None: not scored."""
    accuracy_low: float | None = None
    """Lower end of its 95 % interval."""
    accuracy_high: float | None = None
    scored: int | None = None
    """Problems that were answered."""
    mixture: dict[str, Any] = field(default_factory=dict)
    """Of a mixture of several bases, whose loss `carryon_nll` is: losses of its parts, and shares
    of the gate (MixtureNll). Empty: it is of one base."""
    decoded_cache: dict[str, int] = field(default_factory=dict)
    """Units at a tap that this session read from the decoded cache (`hits`, `hit_bytes`), decoded
    (`misses`), wrote there (`written`, `written_bytes`), and files that it refused. Empty: it has
    none."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> "TrainReport":
        """Return the report in a result.json.

        Raises:
            DamagedFileError: it is not as it was written.
        """
        return read_values(cls, path)

    def losses(self) -> str:
        """Return the held-out losses with their standard errors, for people."""
        what = "mixture" if self.mixture else "carry-on"
        return (
            f"held-out NLL of the base {shown_nll(self.base_nll, self.base_nll_se)}, with the "
            f"{what} {shown_nll(self.carryon_nll, self.carryon_nll_se)} on "
            f"{self.held_out_targets:,} targets"
        )

    def summary(self) -> str:
        """Return one line for people."""
        return (
            f"{self.carryon}: {self.carryon_bytes / 1e6:.2f} MB, trained in {self.train_s:,.0f} s "
            f"({self.tokens_per_second:,.0f} tokens/s); {self.losses()}{self._cached()}"
        )

    def _cached(self) -> str:
        counts = self.decoded_cache
        if not counts:
            return ""
        reads = counts["hits"] + counts["misses"]
        return f"; {counts['hits']:,} of {reads:,} reads of a unit from the decoded cache"


def read_finished(root: str | Path) -> TrainReport:
    """Return the report of a finished run, whose carry-on is compared with its digests.

    Raises:
        DamagedFileError: the report or the carry-on is not as it was written, and the last
            checkpoint can write both again.
        InputError: the carry-on is not, and there is no checkpoint.
    """
    folder = RunFolder(root)
    report = TrainReport.read(folder.result)
    files = read_sealed(folder.result).get(FILES)
    expected = files.get(f"carryon/{WEIGHTS}") if isinstance(files, dict) else None
    try:
        check_carryon(folder.carryon)
        if expected not in (None, digest_tensors(folder.carryon / WEIGHTS)):
            raise DamagedFileError(f"{folder.result}: expected the report of the carry-on there")
    except CarryOnError as error:
        problem = str(error).partition(". Fix: ")[0]
        if newest_checkpoint(folder.checkpoints) is None:
            raise InputError(
                f"{problem}. Fix: put a copy of the carry-on there, or delete {folder.result}; the "
                "same command then trains from the start"
            ) from error
        raise DamagedFileError(problem) from error
    return report


def read_reports(outs: Sequence[str]) -> dict[str, TrainReport]:
    """Return the reports of the runs that are finished, by folder.

    A run whose report or carry-on is damaged is finished again, from its last checkpoint.
    """
    reports = {}
    for out in outs:
        if os.path.lexists(RunFolder(out).result):
            try:
                reports[out] = read_finished(out)
            except DamagedFileError as error:
                logger.warning(f"{error}. The run is finished again from its last checkpoint")
    return reports


def finish_runs(states: Sequence[RunState], processes: Processes) -> list[TrainReport]:
    """Write the carry-ons of runs without steps left, all evaluated in one pass.

    The report is written last and marks a run as finished. After a kill before that, the same
    command finishes the run from its last checkpoint.
    """
    if not states:
        return []
    wait_for_all()  # the first process may still be writing the best checkpoint
    steps = [_load_final_weights(state) for state in states]
    for state in states:
        _round_(state.run)
    data, started_at = states[0].run.data, time.perf_counter()
    nlls = measure_nlls(
        data.store,
        data.split.held_out,
        [state.run.eval_job(with_base=True, with_carryon=True) for state in states],
        stream=data.settings,
    )
    last_s = (time.perf_counter() - started_at) / len(states)
    reports = []
    for state, nll, step in zip(states, nlls, steps, strict=True):
        score = state.record_result(nll, of_step=step)
        report = _report(state, nll, finished_with_step=step, last_evaluate_s=last_s)
        if score:
            report = replace(
                report,
                accuracy=score["accuracy"],
                accuracy_low=score["accuracy_low"],
                accuracy_high=score["accuracy_high"],
                scored=int(score["scored"]),
            )
        reports.append(report)
        if processes.is_first and not state.lacks_score:  # else the same command ends it again
            _warn_about_leak(state.run, nll)
            _write(state.run, nll, reports[-1])
    wait_for_all()
    return reports


def _load_final_weights(state: RunState) -> int:
    """Load the weights that the carry-on ends with; returns their step."""
    run, progress = state.run, state.progress
    if not run.settings.run.finishes_with_best:
        return progress.step
    folder = run.folder.checkpoints
    best = best_checkpoint(folder, progress)
    if best is None:  # the last step has been evaluated, so there is a best one
        raise InputError(
            f"{folder}: expected the checkpoint of the best step {progress.best_step}, got none. "
            f"Fix: delete {folder}; the same command then trains from the start"
        )
    load_weights(best, run.carryon)
    return progress.best_step


def _round_(run: Run) -> None:
    with torch.no_grad():  # a gate is saved in float32
        for weight in inner_carryon(run.carryon).state_dict().values():
            if weight.is_floating_point():
                weight.copy_(weight.to(run.saved_dtype))


def _write(run: Run, nll: Nll, report: TrainReport) -> None:
    save_carryon(
        run.folder.carryon,
        inner_carryon(run.carryon),
        _card(run, nll, report),
        dtype=run.saved_dtype,
        gate=run.carryon.gate if isinstance(run.carryon, MixedCarryOn) else None,
    )
    plot_curves(read_metrics(run.folder.metrics), run.folder.curves)
    document = report.to_dict() | {FILES: finished_files(run.folder)}
    write_json(run.folder.result, sealed(document))


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
        **_mixture_figures(nll),
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
            "samples": [store.samples_digest for store in run.data.stores],
            "parts": [each for store in run.data.stores for each in part_digests(store)],
        },
        alpha=1.0,
        figures=figures,
        versions=library_versions(),
        framing=run.store.framing.to_dict(),
        mixture=_mixture(run),
    )


def _warn_about_leak(run: Run, nll: Nll) -> None:
    if run.projected is None or nll.mixture is None:
        return
    own = run.store.base.get("tokenizer_sha256")
    alike = [
        source.name
        for source in run.projected.sources
        if source.store.base.get("tokenizer_sha256") == own
    ]
    if warning := leak_warning(nll.carryon, nll.mixture, alike):
        logger.warning(f"{run.folder.root}: {warning}")


def _mixture_figures(nll: Nll) -> dict[str, float]:
    """Return the figures of a mixture's parts, whose own loss is that of the carry-on."""
    parts = nll.mixture
    if parts is None:
        return {}
    gate = {"held_out_nll_without_gate": round(parts.carryon_nll, 4)} if parts.gate_shares else {}
    return {
        **gate,
        **{f"held_out_nll_of_{name}": round(each, 4) for name, each in parts.source_nlls.items()},
        **{f"gate_share_of_{name}": round(each, 4) for name, each in parts.gate_shares.items()},
        "held_out_bytes_per_token": round(parts.bytes_per_target, 4),
    }


def _mixture(run: Run) -> dict[str, Any]:
    """Return what the card says of the other bases."""
    if not run.sources:
        return {}
    return {
        "by": run.settings.mixing.mix_by,
        "sources": [source.facts() for source in run.sources],
    }


def _report(
    state: RunState, nll: Nll, *, finished_with_step: int, last_evaluate_s: float
) -> TrainReport:
    run, progress = state.run, state.progress
    weights = inner_carryon(run.carryon).state_dict().values()
    return TrainReport(
        out=str(run.folder.root),
        carryon=str(run.folder.carryon),
        num_parameters=num_parameters(run.carryon),
        carryon_bytes=sum(weight.numel() for weight in weights) * run.saved_dtype.itemsize,
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
        base_perplexity=perplexity_of(nll.base),
        carryon_perplexity=perplexity_of(nll.carryon),
        held_out_contamination=round(run.contamination.share, 4),
        finished_with_step=finished_with_step,
        base_nll_se=null_if_nan(nll.base_se),
        carryon_nll_se=null_if_nan(nll.carryon_se),
        nll_difference_se=null_if_nan(nll.difference_se),
        evaluate_s=round(progress.evaluate_s, 3),
        last_evaluate_s=round(last_evaluate_s, 3),
        mixture=nll.mixture.to_dict() if nll.mixture else {},
        decoded_cache=run.data.decoded.facts() if run.data.decoded else {},
    )
