"""A segment of a learning-rate path: a run that starts from another run's checkpoint.

It has the order of samples of a whole run over the same data, and takes its steps from `first` to
`stop`. Segments with the same start differ only in their learning rates.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.train.config import OptimizationSettings
from carryon.train.data.sampler import Window, count_steps
from carryon.train.optim.lr_paths import Paradigm, path_rate
from carryon.train.trainer.checkpoint import OPTIMIZER, START, WEIGHTS, Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """The steps that a run takes, the state it starts from, and its learning rates."""

    paradigm: Paradigm
    """Kind of the path."""
    version: int
    """Version that the path leads to, counted from 1."""
    ends: tuple[int, ...]
    """Step of the path at which each increment ends, up to this version's."""
    alpha: float
    """Fraction of an increment's steps in which a branch decays."""
    first: int
    """First step, in the order of the data."""
    stop: int
    """Step to end before, in the order of the data."""
    offset: int
    """Step of the path at which the order of the data begins."""
    start: Path | None
    """Step folder with the weights and the optimizer state to start from. None: a new carry-on."""
    saves: tuple[int, ...] = ()
    """Steps after which a checkpoint is written and kept; they do not decide the result."""
    seen: tuple[str, ...] = ()
    """Fingerprints of the data that `start` was trained on, for the carry-on's card."""

    def rate(self, step: int, settings: OptimizationSettings) -> float:
        """Return the learning rate of a step, in the order of the data."""
        return path_rate(
            self.offset + step,
            paradigm=self.paradigm,
            version=self.version,
            ends=self.ends,
            alpha=self.alpha,
            settings=settings,
        )

    def identity(self) -> dict[str, Any]:
        """Return what decides the segment's result as plain values, the start by its digest."""
        return {
            "paradigm": self.paradigm,
            "version": self.version,
            "ends": list(self.ends),
            "path_alpha": self.alpha,
            "steps": [self.first, self.stop, self.offset],
            "start_sha256": digest_of_state(self.start) if self.start else None,
        }


def digest_of_state(folder: Path) -> str:
    """Return the SHA-256 of the weights and the optimizer state in a step folder."""
    digest = hashlib.sha256()
    for name in (WEIGHTS, OPTIMIZER):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def cut_epochs(epochs: Sequence[Sequence[Window]], stop: int) -> list[list[Window]]:
    """Return the first `stop` steps of a run's order; whole windows stay the same objects.

    Raises:
        InputError: there are fewer steps.
    """
    left, cut = stop, []
    for windows in epochs:
        kept = []
        for window in windows:
            if left > 0:
                is_whole = len(window.steps) <= left
                kept.append(window if is_whole else replace(window, steps=window.steps[:left]))
            left -= len(window.steps)
        if kept:
            cut.append(kept)
    if left > 0:
        raise InputError(f"segment of a run: expected {stop} steps or more, got {stop - left}")
    return cut


def progress_at(first: int, epochs: Sequence[Sequence[Window]]) -> Progress:
    """Return the position of a segment before its first step."""
    epoch, left = 0, first
    while epoch < len(epochs) and left >= count_steps(epochs[epoch]):
        left -= count_steps(epochs[epoch])
        epoch += 1
    return replace(START, step=first, epoch=epoch, step_in_epoch=left)
