"""The base's `final` states at the supervised positions of a batch, from any tap that a store has.

The tap `final` holds them. `prenorm` is one norm away, `layer.K` the blocks above it, which a store
with those blocks holds beside the head: an untrained `top`.
Letters: M supervised positions, D base width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from carryon.cache.base.lm_head import FinalNorm
from carryon.cache.device import to_device
from carryon.cache.errors import InputError
from carryon.cache.store.view import StoreLike
from carryon.train.config import CarryOnSettings
from carryon.train.data.batch import Batch
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.modules.carryon import CarryOn, build_carryon


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseStates:
    """Source of the base's `final` states: a tap, and at most one of norm and blocks after it."""

    tap: str
    norm: FinalNorm | None = None
    blocks: CarryOn | None = None

    @torch.no_grad()
    def at_pairs(self, batch: Batch, head: FrozenHead) -> Tensor:
        """Return the `final` states of the supervised positions, [M, D]."""
        if self.blocks is not None:
            with head.autocast():
                return self.blocks.correct_packed(batch.states, batch.packing(), batch.positions)
        states_MD = batch.states[self.tap][batch.positions]
        if self.norm is None:
            return states_MD
        if states_MD.device.type == "cpu":
            return torch.from_numpy(self.norm.apply(states_MD.float().numpy()))
        return apply_norm(self.norm, states_MD)


def apply_norm(norm: FinalNorm, states: Tensor) -> Tensor:
    """Return the normed states [M, D] float32 on their device, as `FinalNorm.apply` to rounding."""
    states = states.float()
    if norm.kind == "layer":
        states = states - states.mean(dim=-1, keepdim=True)
    scale = (states.square().mean(dim=-1, keepdim=True) + norm.eps).rsqrt()
    weight = torch.from_numpy(norm.weight + np.float32(norm.weight_offset))
    normed = states * scale * to_device(weight, states.device)
    if norm.bias is None:
        return normed
    return normed + to_device(torch.from_numpy(norm.bias), states.device)


def get_base_states(store: StoreLike, *, device: torch.device) -> BaseStates:
    """Return the cheapest source of the base's states that a store offers.

    Raises:
        InputError: it offers none.
    """
    if "final" in store.taps:
        return BaseStates(tap="final")
    if "prenorm" in store.taps:
        return BaseStates(tap="prenorm", norm=store.head().norm)
    num_layers = int(store.base.get("num_layers", 0))
    for number in range(1, 1 + store.num_blocks):
        tap = f"layer.{num_layers - number}"
        if tap in store.taps:
            settings = CarryOnSettings(kind="top", blocks=number, taps=[tap])
            blocks = build_carryon(settings, store, seed=0).to(device).requires_grad_(False).eval()
            return BaseStates(tap=tap, blocks=blocks)
    raise InputError(
        f"{store.root}: expected the tap final or prenorm, or layer.K with the blocks above it, to "
        f"measure the base, got {', '.join(store.taps)}. Fix: extract again with --taps "
        f"{' '.join(['final', *store.taps])}"
    )
