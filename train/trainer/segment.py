"""A segment of a learning-rate path: a run that starts from another one's checkpoint.

The order of samples is that of the whole run over the same data; a segment takes the steps from
`first` to `stop`. Two segments with the same start differ in nothing but their learning rates.
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
from carryon.train.trainer.checkpoint import OPTIMIZER, WEIGHTS, Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Which steps a run takes, from which state, at which learning rates."""

    paradigm: Paradigm
    """The path that it is a segment of."""
    version: int
    """The version that the path leads to, counted from 1."""
    ends: tuple[int, ...]
    """The step of the path at which each increment ends, up to this version's."""
    alpha: float
    """Part of an increment's steps in which a branch falls."""
    first: int
    """Step of the data's order to begin at."""
    stop: int
    """Step of it to end before."""
    offset: int
    """Step of the path at which the data's order begins."""
    start: Path | None
    """Step folder whose weights and optimizer state it begins with. None: a new carry-on."""
    saves: tuple[int, ...] = ()
    """Steps after which a checkpoint is written and kept; they do not decide the result."""
    seen: tuple[str, ...] = ()
    """Fingerprints of the data that `start` was trained on already, for the carry-on's card."""

    def rate(self, step: int, settings: OptimizationSettings) -> float:
        """Return the learning rate of a step of the data's order."""
        return path_rate(
            self.offset + step,
            paradigm=self.paradigm,
            version=self.version,
            ends=self.ends,
            alpha=self.alpha,
            settings=settings,
        )

    def identity(self) -> dict[str, Any]:
        """Return what decides the segment's result: plain values, the start by its bytes."""
        return {
            "paradigm": self.paradigm,
            "version": self.version,
            "ends": list(self.ends),
            "path_alpha": self.alpha,
            "steps": [self.first, self.stop, self.offset],
            "start_sha256": digest_of_state(self.start) if self.start else None,
        }


def digest_of_state(folder: Path) -> str:
    """Return the SHA-256 of the weights and the optimizer's state in a step folder."""
    digest = hashlib.sha256()
    for name in (WEIGHTS, OPTIMIZER):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()


def cut_epochs(epochs: Sequence[Sequence[Window]], stop: int) -> list[list[Window]]:
    """Return the first `stop` steps of a run's order; windows that stay whole stay one object.

    Raises:
        InputError: there are fewer.
    """
    left, found = stop, []
    for windows in epochs:
        kept = []
        for window in windows:
            if left > 0:
                whole = len(window.steps) <= left
                kept.append(window if whole else replace(window, steps=window.steps[:left]))
            left -= len(window.steps)
        if kept:
            found.append(kept)
    if left > 0:
        raise InputError(f"a segment of a run: expected {stop} steps or more, got {stop - left}")
    return found


def progress_at(first: int, epochs: Sequence[Sequence[Window]]) -> Progress:
    """Return the position of a segment that has taken no step of its own."""
    epoch, left = 0, first
    while epoch < len(epochs) and left >= count_steps(list(epochs[epoch])):
        left -= count_steps(list(epochs[epoch]))
        epoch += 1
    return Progress(
        step=first,
        epoch=epoch,
        step_in_epoch=left,
        tokens=0,
        targets=0,
        elapsed_s=0.0,
        wait_s=0.0,
    )
