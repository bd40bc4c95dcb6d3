"""A prepared run: all that stays the same from its first step to its last."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.device import pick_chunk, pick_device
from carryon.cache.store.view import StoreLike
from carryon.train.config import (
    LossSettings,
    TrainSettings,
)
from carryon.train.data.contamination import Contamination
from carryon.train.data.datasets import TrainData
from carryon.train.data.sampler import Window, count_steps
from carryon.train.losses.base_states import BaseStates, get_base_states
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.sampled_softmax import place_training_head
from carryon.train.modules.carryon import CarryOn, build_carryon
from carryon.train.modules.taps import stream_taps
from carryon.train.optim.optimizer import apply_memory_settings, build_optimizer
from carryon.train.trainer.nll import EvalJob
from carryon.train.trainer.run_dir import RunFolder
from carryon.train.trainer.segment import Segment, cut_epochs


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What the steps of a run work with."""

    settings: TrainSettings
    folder: RunFolder
    identity: dict[str, Any]
    """Store and settings that a resumed run must have too."""
    data: TrainData
    contamination: Contamination
    """Of the halves of the data."""
    epochs: list[list[Window]]
    """The order of every epoch."""
    carryon: CarryOn
    optimizer: torch.optim.Optimizer
    head: FrozenHead
    chunk: int
    """Supervised positions whose logits exist at one time."""
    base: BaseStates | None
    """The base's own states, where the loss compares with them."""
    segment: Segment | None = None
    """What it takes of the whole order, and from where. None: all, from the start."""

    @property
    def taps(self) -> list[str]:
        """What must be read for a step."""
        also = [] if self.base is None else [self.base.tap]
        return list(dict.fromkeys([*stream_taps(self.settings.carryon), *also]))

    @property
    def store(self) -> StoreLike:
        """Where the data is."""
        return self.data.store

    @property
    def num_steps(self) -> int:
        """Steps of all epochs."""
        return sum(map(count_steps, self.epochs))

    @property
    def windows(self) -> list[Window]:
        """The whole run, from the first epoch to the last."""
        return [window for windows in self.epochs for window in windows]

    @property
    def sampled(self) -> NDArray[np.int64]:
        """Held-out samples of an evaluation during the run."""
        held_out = self.data.split.held_out
        tokens = np.cumsum(self.store.sample_lengths[held_out])
        return held_out[: max(1, int((tokens <= self.settings.run.evaluate_tokens).sum()))]

    def eval_job(self, *, with_base: bool, with_carryon: bool) -> EvalJob:
        """Return what an evaluation measures of this run."""
        return EvalJob(
            carryon=self.carryon if with_carryon else None,
            head=self.head,
            chunk=self.chunk,
            with_base=with_base,
        )


def prepare_run(
    settings: TrainSettings,
    data: TrainData,
    *,
    folder: RunFolder,
    identity: dict[str, Any],
    contamination: Contamination,
    heads: dict[LossSettings, FrozenHead],
    segment: Segment | None = None,
) -> Run:
    """Plan the order, build the untrained carry-on and load the head; nothing is written.

    Args:
        settings: of the run, resolved by `TrainData.resolve`.
        data: what it is trained on.
        folder: of the run.
        identity: see `run_identity`.
        contamination: of the halves of the data.
        heads: of runs prepared before, by their settings; this run's is added.
        segment: what it takes of the whole order. None: all of it.

    Raises:
        InputError: the device is not there.
    """
    optimization = settings.optimization
    device = pick_device(settings.run.device)
    if settings.loss not in heads:  # first: it says what becomes of memory that is freed
        heads[settings.loss] = place_training_head(data.store, settings.loss, device=device)
    carryon = build_carryon(settings.carryon, data.store, seed=optimization.seed)
    carryon = apply_memory_settings(carryon.to(device), settings.memory)
    return Run(
        settings=settings,
        folder=folder,
        identity=identity,
        data=data,
        contamination=contamination,
        epochs=cut_epochs(data.plan(optimization), segment.stop)
        if segment
        else data.plan(optimization),
        segment=segment,
        carryon=carryon,
        optimizer=build_optimizer(carryon, optimization, settings.memory),
        head=heads[settings.loss],
        chunk=pick_chunk(settings.loss.chunk_tokens),
        base=get_base_states(data.store, device=device) if settings.loss.kl_weight else None,
    )
