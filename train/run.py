"""A prepared run: all that stays the same from its first step to its last."""

from dataclasses import dataclass
from typing import Any

import torch

from carryon.cache.reader import Store
from carryon.train.carryon import CarryOn, build_carryon
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
)
from carryon.train.device import pick_chunk, pick_device, pick_head_dtype
from carryon.train.evaluate import sample_units
from carryon.train.loss import FrozenHead, frozen_head
from carryon.train.order import Window, count_steps, plan_epoch, seek
from carryon.train.run_folder import RunFolder
from carryon.train.split import Split, split_samples
from carryon.train.step import build_optimizer


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """The settings of a run, by concern."""

    carryon: CarryOnSettings
    optimization: OptimizationSettings
    stream: StreamSettings
    loss: LossSettings
    run: RunSettings

    def to_flat(self) -> dict[str, Any]:
        """Return all fields under their own names, as plain values."""
        parts = (self.carryon, self.optimization, self.stream, self.loss, self.run)
        return {key: value for part in parts for key, value in part.to_dict().items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What the steps of a run work with."""

    settings: TrainSettings
    folder: RunFolder
    identity: dict[str, Any]
    """Store and settings that a resumed run must have too."""
    store: Store
    split: Split
    epochs: list[list[Window]]
    """The order of every epoch."""
    carryon: CarryOn
    optimizer: torch.optim.Optimizer
    head: FrozenHead
    chunk: int
    """Supervised positions whose logits exist at one time."""

    @property
    def num_steps(self) -> int:
        """Steps of all epochs."""
        return sum(map(count_steps, self.epochs))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.head.weight.device

    def windows_from(self, epoch: int, step_in_epoch: int) -> list[Window]:
        """Return what is left of the run at a position, through its last epoch."""
        following = [window for windows in self.epochs[epoch + 1 :] for window in windows]
        return seek(self.epochs[epoch], step_in_epoch) + following if self.epochs[epoch:] else []


def split_store(settings: TrainSettings, store: Store) -> Split:
    """Return which samples of `store` a run trains on, and which it holds out.

    Raises:
        InputError: one of the halves would be empty.
    """
    return split_samples(
        store.sample_held_out,
        share=settings.stream.held_out_share,
        seed=settings.optimization.seed,
        fingerprint=store.fingerprint,
    )


def prepare_run(
    settings: TrainSettings,
    store: Store,
    split: Split,
    *,
    folder: RunFolder,
    identity: dict[str, Any],
) -> Run:
    """Plan the order, build the untrained carry-on and load the head; nothing is written.

    Raises:
        InputError: the device is not there.
    """
    optimization = settings.optimization
    device = pick_device(settings.run.device)
    carryon = build_carryon(settings.carryon, base_width=store.width, seed=optimization.seed)
    carryon = carryon.to(device)
    dtype = pick_head_dtype(settings.loss.head_dtype, device)
    return Run(
        settings=settings,
        folder=folder,
        identity=identity,
        store=store,
        split=split,
        epochs=[_plan(settings, store, split, epoch) for epoch in range(optimization.epochs)],
        carryon=carryon,
        optimizer=build_optimizer(carryon, optimization),
        head=frozen_head(store.head(), device=device, dtype=dtype),
        chunk=pick_chunk(settings.loss.chunk_tokens, device),
    )


def _plan(settings: TrainSettings, store: Store, split: Split, epoch: int) -> list[Window]:
    return plan_epoch(
        split.train,
        lengths=store.sample_lengths,
        units=sample_units(store),
        seed=(settings.optimization.seed, int(store.fingerprint[:16], 16)),
        epoch=epoch,
        batch_tokens=settings.optimization.batch_tokens,
        micro_batch_tokens=settings.optimization.micro_batch_tokens,
        window_units=settings.stream.window_units,
    )
