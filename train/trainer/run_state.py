"""A run in progress: its position, its steps, and what follows a step."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from carryon.cache.errors import InputError
from carryon.train.data.batch import Batch
from carryon.train.data.sampler import count_steps
from carryon.train.mixing.mixture import inner_carryon
from carryon.train.modules.bottleneck import Bottleneck
from carryon.train.trainer.checkpoint import (
    START,
    Progress,
    load_newest,
    load_state,
    newest_checkpoint,
    save_checkpoint,
)
from carryon.train.trainer.distributed import Processes
from carryon.train.trainer.held_out.nll import Nll, shown_nll
from carryon.train.trainer.metrics import (
    OF_STEP,
    RESULT,
    Meter,
    MetricsLog,
    digest_of_metrics,
    rewind_metrics,
    start_tracker,
)
from carryon.train.trainer.run import Run
from carryon.train.trainer.run_dir import record_session
from carryon.train.trainer.segment import progress_at
from carryon.train.trainer.step import NotFiniteError, Step, read_steps

logger = logging.getLogger(__name__)

NAMED_SAMPLES = 5
"""Maximum samples that an error names."""


class RunState:
    """A run at its present step.

    `awaits_evaluation` is set after a step that an evaluation follows. The next step must not be
    taken before `record_evaluation`: several runs are evaluated together.
    """

    def __init__(self, run: Run, processes: Processes) -> None:
        """Resume from the newest sound checkpoint, or start if there is none."""
        self.run = run
        self.progress = START
        self.awaits_evaluation = False
        self._saved_step = -1
        saved = load_newest(
            run.folder.checkpoints,
            carryon=run.carryon,
            optimizer=run.optimizer,
            identity=run.identity,
            needs_best=run.settings.run.finishes_with_best,
        )
        if saved is not None:
            self.progress = saved
            self._saved_step = saved.step
        elif run.segment is not None:
            self.progress = progress_at(run.segment.first, run.epochs)
            if run.segment.start is not None:
                load_state(run.segment.start, carryon=run.carryon, optimizer=run.optimizer)
        self.lacks_score = False
        """Whether a score has failed."""
        self.is_new = saved is None
        """Whether the base has not been measured yet."""
        self._meter = Meter(self.progress)
        self._unread: list[tuple[int, Step]] = []  # by number, from 1
        self._log: MetricsLog | None = None
        if processes.is_first:
            rewind_metrics(
                run.folder.metrics,
                step=-1 if self.is_new else self.progress.step,
                sha256=self.progress.metrics_sha256,
            )
            record_session(run.folder, step=self.progress.step, processes=processes.size)
            tracker = start_tracker(
                run.settings.run.tracker, folder=run.folder.root, config=run.settings.to_flat()
            )
            self._log = MetricsLog(run.folder.metrics, tracker=tracker, callbacks=run.callbacks)

    @property
    def is_done(self) -> bool:
        """Whether no step is left, or patience has run out."""
        patience = self.run.settings.run.patience
        stops_early = 0 < patience <= self.progress.evaluations_since_best
        is_last = self.progress.step == self.run.num_steps
        return not self.awaits_evaluation and (stops_early or is_last)

    @property
    def error(self) -> Exception | None:
        """The exception of a callback, if one has failed."""
        return None if self._log is None else self._log.error

    def take_step(self, batches: Sequence[Batch], *, wait_s: float) -> dict[str, Any] | None:
        """Take one step; returns its line of metrics, if it has one.

        On a GPU the figures of a step are read with its line, so that the host goes ahead.

        Args:
            batches: of the step.
            wait_s: seconds spent waiting for them.

        Raises:
            InputError: the loss or gradient is not finite; names samples.
        """
        run, started_at = self.run, time.perf_counter()
        rate = self.run.rate(self.progress.step)
        try:
            with _seeded(run, self.progress.step):
                step = run.take_step(batches, rate=rate, is_read=run.head.device.type != "cuda")
        except NotFiniteError as error:
            raise self._not_finite(error, step=self.progress.step + 1) from error
        before = self.progress
        ends_epoch = before.step_in_epoch + 1 == count_steps(run.epochs[before.epoch])
        self.progress = replace(
            before,
            step=before.step + 1,
            epoch=before.epoch + ends_epoch,
            step_in_epoch=0 if ends_epoch else before.step_in_epoch + 1,
            tokens=before.tokens + step.tokens,
            targets=before.targets + step.targets,
        )
        self._unread.append((self.progress.step, step))
        if step.figures is not None or self._has_line():
            self._read_steps()
        elapsed_s = time.perf_counter() - started_at
        self.progress = replace(
            self.progress,
            elapsed_s=before.elapsed_s + elapsed_s + wait_s,
            wait_s=before.wait_s + wait_s,
        )
        return self._follow_up(batches, rate)

    def _read_steps(self) -> None:
        """Count the steps whose figures have not been read.

        Raises:
            InputError: the loss or gradient of one is not finite.
        """
        unread, self._unread = self._unread, []
        try:
            read_steps([step for _, step in unread])
        except NotFiniteError as error:
            [number, *_] = [number for number, step in unread if step.figures is None]
            raise self._not_finite(error, step=number) from error
        for _, step in unread:
            self._meter.add(step.read())

    def record_baseline(self, nll: Nll, *, seconds: float) -> None:
        """Record the base's held-out loss, with which a run begins."""
        self._add_evaluation(seconds)
        self._write({"step": 0, "epoch": 0, **nll.to_line(of_base=True)})
        self._show("the base", nll.base, nll.base_se, nll)
        if self.run.scoring is not None:
            self._write_score({})
        self.is_new = False

    def record_evaluation(self, nll: Nll, *, seconds: float) -> None:
        """Record the held-out loss at the present step, and save a checkpoint that holds it."""
        self.awaits_evaluation = False
        self._add_evaluation(seconds)
        self._write({"step": self.progress.step, "epoch": self.progress.epoch, **nll.to_line()})
        self._show(f"step {self.progress.step:,}", nll.carryon, nll.carryon_se, nll)
        self.progress = with_evaluation(self.progress, nll.carryon)
        self.save()

    def record_result(self, nll: Nll, *, of_step: int) -> Mapping[str, float]:
        """Record loss and score of the finished carry-on, and close the log; returns the score.

        Args:
            nll: the loss.
            of_step: step whose weights the carry-on has, of an earlier one if that was the best.
        """
        progress = self.progress
        end: dict[str, Any] = {RESULT: True}
        end |= {OF_STEP: of_step} if of_step != progress.step else {}
        self._write({"step": progress.step, "epoch": progress.epoch, **nll.to_line(), **end})
        score = self._try_score(end)
        if self._log is not None:
            self._log.close()
        return score

    def save(self) -> None:
        """Save a checkpoint of the present step, unless it is saved.

        Raises:
            InputError: the loss or gradient of a step that was not read is not finite.
        """
        self._read_steps()
        if self._log is not None and self._saved_step != self.progress.step:
            run = self.run
            keeps_all = run.segment is not None and run.segment.saves
            save_checkpoint(
                run.folder.checkpoints,
                carryon=run.carryon,
                optimizer=run.optimizer,
                progress=replace(
                    self._meter.kept_in(self.progress),
                    metrics_sha256=digest_of_metrics(run.folder.metrics),
                ),
                identity=run.identity,
                keep=sys.maxsize if keeps_all else run.settings.run.keep_checkpoints,
            )
        self._saved_step = self.progress.step

    def _follow_up(self, batches: Sequence[Batch], rate: float) -> dict[str, Any] | None:
        progress = self.progress
        self.awaits_evaluation = self._is_evaluated()
        line = None
        if self._has_line():
            line = self._meter.line(progress, learning_rate=rate) | self._tap_ratios(batches)
            self._write(line)
        if not self._is_last and self.run.scoring and progress.step % self.run.scoring.every == 0:
            self._read_steps()
            self._try_score()
        if self._is_saved() and not self.awaits_evaluation:
            self.save()
        return line

    @property
    def _is_last(self) -> bool:
        return self.progress.step == self.run.num_steps

    def _is_evaluated(self) -> bool:
        # finish.py evaluates the end as it is saved, rounded, unless it competes for the best.
        settings = self.run.settings.run
        if self._is_last:
            return settings.finishes_with_best
        return _is_due(settings.evaluate_every, self.progress)

    def _is_saved(self) -> bool:
        segment, every = self.run.segment, self.run.settings.run.checkpoint_every
        is_planned = segment is not None and self.progress.step in segment.saves
        return self._is_last or _is_due(every, self.progress) or is_planned

    def _has_line(self) -> bool:
        is_logged = self.progress.step % self.run.settings.run.log_every == 0
        return is_logged or self._is_saved() or self._is_evaluated()

    def _try_score(self, end: Mapping[str, Any] | None = None) -> Mapping[str, float]:
        """Record a score, if there is to be one; an error is kept, as that of a callback."""
        if self._log is None or self._log.error is not None:
            return {}
        try:
            return self._write_score(end or {})
        except Exception as error:
            self._log.error, self.lacks_score = error, True
            return {}

    def _write_score(self, end: Mapping[str, Any]) -> Mapping[str, float]:
        run, progress = self.run, self.progress
        if run.scoring is None or self._log is None:
            return {}
        weights = {
            name: weight.detach().to("cpu", run.saved_dtype, copy=True)
            if weight.is_floating_point()
            else weight.detach().to("cpu", copy=True)
            for name, weight in run.carryon.state_dict().items()
        }
        score = run.scoring.score(run.settings.carryon, weights)
        self._write({"step": progress.step, "epoch": progress.epoch, **score, **end})
        logger.info(
            f"{run.folder.root}: step {progress.step:,}: {score['accuracy']:.1%} right "
            f"({score['accuracy_low']:.1%} to {score['accuracy_high']:.1%}) of "
            f"{score['scored']:,} answers, {score['cut']:.0%} cut, in {score['score_s']:.0f} s"
        )
        return score

    def _add_evaluation(self, seconds: float) -> None:
        self.progress = replace(self.progress, evaluate_s=self.progress.evaluate_s + seconds)

    def _show(self, name: str, value: float, se: float, nll: Nll) -> None:
        if self._log is not None:
            of_all = len(self.run.data.split.held_out)
            logger.info(
                f"{self.run.folder.root}: {name}: held-out NLL {shown_nll(value, se)} on "
                f"{nll.targets:,} targets of {nll.samples:,} of {of_all:,} samples"
            )

    def _tap_ratios(self, batches: Sequence[Batch]) -> dict[str, Any]:
        taps, carryon = self.run.settings.carryon.taps, inner_carryon(self.run.carryon)
        if len(taps) == 1 or not batches or not isinstance(carryon, Bottleneck):
            return {}
        batch = batches[0].to(self.run.head.device)
        with torch.no_grad():
            ratios = carryon.tap_ratios(batch.states).flatten(0, -2).float().mean(dim=0)
        return {"tap_ratios": dict(zip(taps, ratios.tolist(), strict=True))}

    def _write(self, line: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(line)

    def _not_finite(self, error: NotFiniteError, *, step: int) -> InputError:
        store, folder = self.run.store, self.run.folder
        ids = [store.sample_id(sample) for sample in error.samples[:NAMED_SAMPLES]]
        more = len(error.samples) - len(ids)
        newest = newest_checkpoint(folder.checkpoints)
        return InputError(
            f"{folder.root}: step {step}: expected a finite loss and gradient, "
            f"got nan or infinity in the samples {', '.join(ids)}"
            f"{f' and {more} more' if more else ''}. Fix: look at the samples, or start in another "
            "--out with a lower --learning-rate. Last good checkpoint: "
            f"{newest.name if newest else 'none'}"
        )


def with_evaluation(progress: Progress, nll: float) -> Progress:
    """Return `progress` with the held-out loss of its step."""
    if progress.best_nll is None or nll < progress.best_nll:
        return replace(progress, best_nll=nll, best_step=progress.step, evaluations_since_best=0)
    return replace(progress, evaluations_since_best=progress.evaluations_since_best + 1)


def _is_due(every: int, progress: Progress) -> bool:
    return progress.step % every == 0 if every else progress.step_in_epoch == 0


@contextmanager
def _seeded(run: Run, step: int) -> Iterator[None]:
    """Seed torch so that dropout and rounding depend on the run's seed and the step alone."""
    words = np.random.SeedSequence([run.settings.optimization.seed, step]).generate_state(2)
    device = run.head.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        yield
