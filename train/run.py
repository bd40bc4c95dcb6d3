"""A prepared run: all that stays the same from its first step to its last."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.reader import Store
from carryon.train.base_states import BaseStates, find_base_states
from carryon.train.blocks_carryon import build_kind
from carryon.train.carryon import CarryOn
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
)
from carryon.train.device import pick_chunk, pick_device
from carryon.train.evaluate import Judged, stream_taps
from carryon.train.frozen_head import FrozenHead
from carryon.train.kind_rates import with_own_rate
from carryon.train.optimizer import build_optimizer, lean_
from carryon.train.order import Window, count_steps
from carryon.train.overlap import Overlap
from carryon.train.piece import Piece, cut_epochs
from carryon.train.run_folder import RunFolder
from carryon.train.sampled_softmax import place_training_head
from carryon.train.train_data import TrainData


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """The settings of a run, by concern; what is not given is as usual."""

    carryon: CarryOnSettings = field(default_factory=CarryOnSettings)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    stream: StreamSettings = field(default_factory=StreamSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    run: RunSettings = field(default_factory=RunSettings)

    def resolved(self) -> Self:
        """Return the settings with the learning rate of the carry-on's kind if none is given."""
        return replace(self, optimization=with_own_rate(self.optimization, self.carryon))

    def to_flat(self) -> dict[str, Any]:
        """Return all fields under their own names, as plain values, as they are in force."""
        parts = (
            self.carryon,
            self.resolved().optimization,
            self.stream,
            self.loss,
            self.memory,
            self.run,
        )
        return {key: value for part in parts for key, value in part.to_dict().items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What the steps of a run work with."""

    settings: TrainSettings
    folder: RunFolder
    identity: dict[str, Any]
    """Store and settings that a resumed run must have too."""
    data: TrainData
    overlap: Overlap
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
    piece: Piece | None = None
    """What it takes of the whole order, and from where. None: all, from the start."""

    @property
    def taps(self) -> list[str]:
        """What must be read for a step."""
        also = [] if self.base is None else [self.base.tap]
        return list(dict.fromkeys([*stream_taps(self.settings.carryon), *also]))

    @property
    def store(self) -> Store:
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

    def judged(self, *, with_base: bool, with_carryon: bool) -> Judged:
        """Return what an evaluation measures of this run."""
        return Judged(
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
    overlap: Overlap,
    heads: dict[LossSettings, FrozenHead],
    piece: Piece | None = None,
) -> Run:
    """Plan the order, build the untrained carry-on and load the head; nothing is written.

    Args:
        settings: of the run.
        data: what it is trained on.
        folder: of the run.
        identity: see `run_identity`.
        overlap: of the halves of the data.
        heads: of runs prepared before, by their settings; this run's is added.
        piece: what it takes of the whole order. None: all of it.

    Raises:
        InputError: the device is not there.
    """
    settings = settings.resolved()
    optimization = settings.optimization
    device = pick_device(settings.run.device)
    if settings.loss not in heads:  # first: it says what becomes of memory that is freed
        heads[settings.loss] = place_training_head(data.store, settings.loss, device=device)
    carryon = build_kind(settings.carryon, data.store, seed=optimization.seed)
    carryon = lean_(carryon.to(device), settings.memory)
    return Run(
        settings=settings,
        folder=folder,
        identity=identity,
        data=data,
        overlap=overlap,
        epochs=cut_epochs(data.plan(optimization), piece.stop)
        if piece
        else data.plan(optimization),
        piece=piece,
        carryon=carryon,
        optimizer=build_optimizer(carryon, optimization, settings.memory),
        head=heads[settings.loss],
        chunk=pick_chunk(settings.loss.chunk_tokens),
        base=find_base_states(data.store, device=device) if settings.loss.kl_weight else None,
    )
