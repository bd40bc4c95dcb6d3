"""The metrics of a run: one line for every few steps and for each evaluation.

A line is a JSON object in metrics.jsonl. A tracker and callbacks get the same lines.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from carryon.cache.files.atomic import write_file
from carryon.cache.files.regular import digest_file
from carryon.cache.optional import require
from carryon.train.config import CarryOnSettings
from carryon.train.trainer.checkpoint import Progress
from carryon.train.trainer.run_documents import append_line, lines_bytes, read_whole_lines
from carryon.train.trainer.step import StepFigures

logger = logging.getLogger(__name__)

Callback = Callable[[dict[str, Any]], object]
"""Gets each line of metrics.jsonl."""
ScoreWeights = Callable[[CarryOnSettings, Mapping[str, Tensor]], Mapping[str, float]]
"""Returns figures of a carry-on, `accuracy` among them, for a line of metrics.jsonl: from its
settings and a copy of its weights as they would be saved. It may not change any random state."""
OF_STEP = "of_step"
"""In a line of the result: step whose weights the carry-on ends with, if it is not the last."""
RESULT = "is_result"
"""Marks the line with the loss of the finished carry-on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """What scores a run on its way."""

    every: int
    """Steps between scores. The untrained and the finished carry-on are scored in any case."""
    score: ScoreWeights


class Meter:
    """Sums up the steps between two lines of metrics."""

    def __init__(self, start: Progress) -> None:
        """Begin after the steps of `start`, with those since its last line."""
        self._start = replace(
            start,
            tokens=start.tokens - start.line_tokens,
            targets=start.targets - start.line_targets,
            elapsed_s=start.elapsed_s - start.line_elapsed_s,
            wait_s=start.wait_s - start.line_wait_s,
        )
        self._loss_sum = start.line_loss_sum
        self._grad_norm = start.line_grad_norm

    def add(self, figures: StepFigures) -> None:
        """Count one step."""
        self._loss_sum += figures.loss * figures.targets
        self._grad_norm = max(self._grad_norm, figures.grad_norm)

    def kept_in(self, progress: Progress) -> Progress:
        """Return `progress` with the sums since the last line, to begin from after a stop."""
        start = self._start
        return replace(
            progress,
            line_tokens=progress.tokens - start.tokens,
            line_targets=progress.targets - start.targets,
            line_elapsed_s=progress.elapsed_s - start.elapsed_s,
            line_wait_s=progress.wait_s - start.wait_s,
            line_loss_sum=self._loss_sum,
            line_grad_norm=self._grad_norm,
        )

    def line(self, progress: Progress, *, learning_rate: float) -> dict[str, Any]:
        """Return the metrics of the steps up to `progress`, and begin again after them."""
        start = self._start
        elapsed_s = max(progress.elapsed_s - start.elapsed_s, 1e-9)
        line = {
            "step": progress.step,
            "epoch": progress.epoch,
            "loss": self._loss_sum / max(1, progress.targets - start.targets),
            "learning_rate": learning_rate,
            "grad_norm": self._grad_norm,
            "tokens": progress.tokens,
            "targets": progress.targets,
            "tokens_per_second": (progress.tokens - start.tokens) / elapsed_s,
            "targets_per_second": (progress.targets - start.targets) / elapsed_s,
            "data_wait_ratio": (progress.wait_s - start.wait_s) / elapsed_s,
            "elapsed_s": progress.elapsed_s,
        }
        self._start, self._loss_sum, self._grad_norm = progress, 0.0, 0.0
        return line


class MetricsLog:
    """Writes lines of metrics to the file, the tracker and the callbacks of a run."""

    def __init__(self, path: Path, *, tracker: Any, callbacks: Sequence[Callback]) -> None:  # noqa: ANN401
        """Append to `path`.

        Args:
            path: of metrics.jsonl.
            tracker: of accelerate, or None.
            callbacks: called with each line. The first exception of one is kept in `error`, for
                the trainer to raise once the run is saved; no callback is called after it.
        """
        self.error: Exception | None = None
        self._path = path
        self._tracker = tracker
        self._callbacks = callbacks

    def write(self, line: dict[str, Any]) -> None:
        """Append one line; a kill afterwards does not lose it."""
        append_line(self._path, line)
        if self._tracker is not None:
            ratios = line.get("tap_ratios", {})
            shares = line.get("mixture", {}).get("gate_shares", {})
            values = line | {f"tap_ratio/{tap}": ratio for tap, ratio in ratios.items()}
            values |= {f"gate_share/{name}": share for name, share in shares.items()}
            numbers = {key: value for key, value in values.items() if _is_number(value)}
            self._tracker.log(numbers, step=numbers.pop("step"))
        for callback in self._callbacks if self.error is None else ():
            try:
                callback(dict(line))
            except Exception as error:
                self.error = error
                return

    def close(self) -> None:
        """Finish the tracker's record."""
        if self._tracker is not None:
            self._tracker.finish()


def start_tracker(name: str, *, folder: Path, config: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return a tracker of accelerate that records the run in `folder`; None for the name `none`.

    Raises:
        MissingExtraError: the tracker's package is not installed.
    """
    if name == "none":
        return None
    require(name, extra=name, purpose=f"the tracker {name}")
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's trackers ask it which process writes
    kind = LOGGER_TYPE_TO_CLASS[name]
    place = {"logging_dir": folder} if kind.requires_logging_directory else {}
    tracker = kind(name if place else folder.name, **place)
    if hasattr(tracker, "start"):
        tracker.start()
    tracker.store_init_configuration(
        {key: value if _is_number(value) else str(value) for key, value in config.items()}
    )
    return tracker


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl, without damaged ones and one cut off by a kill."""
    return read_whole_lines(path)[0]


def digest_of_metrics(path: Path) -> str:
    """Return the SHA-256 of a metrics.jsonl; of a missing one an empty text."""
    return digest_file(path) if path.is_file() else ""


def rewind_metrics(path: Path, *, step: int, sha256: str = "") -> None:
    """Drop the lines after `step` and that of the result, which a resumed run writes again.

    Damaged lines are dropped with a warning, and all if they are not those of the run: no result
    depends on them.

    Args:
        path: of metrics.jsonl.
        step: of the checkpoint.
        sha256: of the lines up to there. Empty: not known.

    Raises:
        DamagedFileError: it is no regular file.
    """
    lines, damaged = read_whole_lines(path)
    if damaged:
        logger.warning(f"{path}: damaged lines are dropped: {', '.join(map(str, damaged))}")
    if os.path.lexists(path):
        kept = [line for line in lines if line["step"] <= step and RESULT not in line]
        content = lines_bytes(kept)
        if sha256 and not damaged and hashlib.sha256(content).hexdigest() != sha256:
            logger.warning(
                f"{path}: the lines up to step {step} are not those that this run wrote: dropped"
            )
            content = b""
        write_file(path, content)
