"""The base's own last states at the supervised pairs of a batch, from whichever tap a store has.

The tap `final` holds them. From `prenorm` they are one norm away, from `layer.K` the blocks above
it, which a store with those blocks holds beside the head: as a `top` before its first step.
Letters: M supervised pairs, D base width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from carryon.cache.base.lm_head import FinalNorm
from carryon.cache.errors import InputError
from carryon.cache.store.view import StoreLike
from carryon.train.config import CarryOnSettings
from carryon.train.data.batch import Batch
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.modules.carryon import CarryOn, build_carryon


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseStates:
    """Where the base's `final` states come from."""

    tap: str
    """The tap that is read."""
    norm: FinalNorm | None = None
    """What leads from it to `final`, or None."""
    blocks: CarryOn | None = None
    """What leads from it to `final`, or None."""

    @torch.no_grad()
    def at_pairs(self, batch: Batch, head: FrozenHead) -> Tensor:
        """Return the `final` states of the supervised pairs, [M, D]."""
        if self.blocks is not None:
            with head.autocast():
                return self.blocks.correct_packed(batch.states, batch.packing(), batch.positions)
        states_MD = batch.states[self.tap][batch.positions]
        if self.norm is None:
            return states_MD
        normed = self.norm.apply(states_MD.float().cpu().numpy())
        return torch.from_numpy(normed).to(states_MD.device)


def get_base_states(store: StoreLike, *, device: torch.device) -> BaseStates:
    """Return the cheapest way to the base's states that a store offers.

    Raises:
        InputError: it offers none.
    """
    if "final" in store.taps:
        return BaseStates(tap="final")
    if "prenorm" in store.taps:
        return BaseStates(tap="prenorm", norm=store.head().norm)
    num_layers = int(store.base["num_layers"])
    for number in range(1, 1 + store.num_blocks):
        tap = f"layer.{num_layers - number}"
        if tap in store.taps:
            settings = CarryOnSettings(kind="top", blocks=number, taps=[tap])
            blocks = build_carryon(settings, store, seed=0).to(device).requires_grad_(False).eval()
            return BaseStates(tap=tap, blocks=blocks)
    raise InputError(
        f"{store.root}: expected the tap final or prenorm, or a lower one with the blocks above "
        f"it, to measure the base; it has {', '.join(store.taps)}: extract again with --taps "
        f"{' '.join(['final', *store.taps])}"
    )
