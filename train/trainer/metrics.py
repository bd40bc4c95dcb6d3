"""The metrics of a run: JSON lines, one for every few steps and one for each evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carryon.cache.files import append_line, read_lines, write_file
from carryon.cache.optional import require
from carryon.train.trainer.checkpoint import Progress
from carryon.train.trainer.step import StepFigures


class Meter:
    """Sums up the steps between two lines of metrics."""

    def __init__(self, since: Progress) -> None:
        """Begin after the steps that `since` counts."""
        self._since = since
        self._loss_sum = 0.0
        self._grad_norm = 0.0

    def add(self, figures: StepFigures) -> None:
        """Count one step."""
        self._loss_sum += figures.loss * figures.targets
        self._grad_norm = max(self._grad_norm, figures.grad_norm)

    def line(self, progress: Progress, *, learning_rate: float) -> dict[str, Any]:
        """Return the metrics of the steps up to `progress`, then begin again there."""
        since = self._since
        elapsed_s = max(progress.elapsed_s - since.elapsed_s, 1e-9)
        line = {
            "step": progress.step,
            "epoch": progress.epoch,
            "loss": self._loss_sum / max(1, progress.targets - since.targets),
            "learning_rate": learning_rate,
            "grad_norm": self._grad_norm,
            "tokens": progress.tokens,
            "targets": progress.targets,
            "tokens_per_second": (progress.tokens - since.tokens) / elapsed_s,
            "targets_per_second": (progress.targets - since.targets) / elapsed_s,
            "data_wait_ratio": (progress.wait_s - since.wait_s) / elapsed_s,
            "elapsed_s": progress.elapsed_s,
        }
        self._since, self._loss_sum, self._grad_norm = progress, 0.0, 0.0
        return line


def append_metrics(path: Path, line: dict[str, Any]) -> None:
    """Append one line to `path`; a kill afterwards does not take it back."""
    append_line(path, line)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `path`; a last line that a kill cut short is left out."""
    return read_lines(path)


def rewind_metrics(path: Path, *, step: int) -> None:
    """Drop the lines after `step`, which a resumed run will write again."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode("ascii"))


MODULES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
"""Tracker -> the module that it needs; each is an extra of its own name."""


class Tracker:
    """Passes lines of metrics on; the tracker `none` passes nothing."""

    def __init__(self, name: str, *, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin a record of the run in `folder`.

        Args:
            name: as in RunSettings.
            folder: of the run.
            config: every setting, flat.

        Raises:
            MissingExtraError: the tracker's package is not installed.
        """
        self._tracker: Any = None
        if name == "none":
            return
        require(MODULES[name], extra=name, purpose=f"the tracker {name}")
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's trackers ask it which process writes
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": folder} if kind.requires_logging_directory else {}
        self._tracker = kind(name if place else folder.name, **place)
        if hasattr(self._tracker, "start"):
            self._tracker.start()
        self._tracker.store_init_configuration(
            {
                key: value if isinstance(value, (int, float)) else str(value)
                for key, value in config.items()
            }
        )

    def log(self, line: Mapping[str, Any]) -> None:
        """Pass on the numbers of a line of `metrics.jsonl`."""
        if self._tracker is None:
            return
        values = {key: value for key, value in line.items() if isinstance(value, (int, float))}
        shares = line.get("tap_ratios", {})
        values |= {f"tap_ratio/{tap}": share for tap, share in shares.items()}
        self._tracker.log(values, step=values.pop("step"))

    def close(self) -> None:
        """End the record."""
        if self._tracker is not None:
            self._tracker.finish()
