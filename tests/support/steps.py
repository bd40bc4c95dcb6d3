"""Batches of a store as the trainer reads them, and steps with the settings that tests share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from carryon.cache.store.reader import Store
from carryon.train.config import StreamSettings
from carryon.train.data.batch import Batch
from carryon.train.data.loader import Stream
from carryon.train.data.sampler import plan_pass
from carryon.train.data.split import sample_units
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.modules.carryon import CarryOn
from carryon.train.trainer.step import Step, take_step


def read_batches(store: Store, taps: list[str], *, is_pinned: bool) -> list[Batch]:
    """Return all batches of a store, for a GPU in pinned memory."""
    windows = plan_pass(
        np.arange(store.num_samples, dtype=np.int64),
        lengths=store.sample_lengths,
        units=sample_units(store),
        tokens_per_step=64,
    )
    stream = Stream(store, windows, taps=taps, settings=StreamSettings(), is_pinned=is_pinned)
    with stream as steps:
        return [batch for batches in steps for batch in batches]


def take(
    carryon: CarryOn,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    head: FrozenHead,
    **more: Any,  # noqa: ANN401
) -> Step:
    """Take a step; `more` is as of `take_step`."""
    fixed: dict[str, Any] = {"chunk": 32, "learning_rate": 1e-3, "grad_clip": 1.0}
    return take_step(carryon, optimizer, batches, head=head, **fixed, **more)
