"""What the carry-ons of a batch do to the base's last hidden state, and their part of its cache.

Letters: B rows, T positions, D base width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from carryon.cache.errors import InputError
from carryon.train.inference.adapters import CarryOnSet
from carryon.train.modules.carryon import CarryOn, customized_states


class CarryOnLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer of a carry-on's body, told apart by its class from those of the base."""

    begun_by: "Correction"
    """Whose carry-ons the cache was begun with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """Which carry-ons correct the rows of a batch, and how strongly."""

    slots: tuple[int, ...]
    """Slot of each row; a single one where all rows have the same."""
    modules: Sequence[CarryOn]
    """One for each shape; their deltas add up."""
    alpha: float | Tensor
    """For all rows, or for each, [B] float32."""

    @property
    def lower_taps(self) -> list[str]:
        """Taps besides `final` that the carry-ons read."""
        taps = (tap for module in self.modules for tap in module.settings.taps)
        return [tap for tap in dict.fromkeys(taps) if tap != "final"]

    def apply(
        self,
        states: Mapping[str, Tensor],
        *,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """Return the customized states, [B, T, D] in the type of `final`.

        Args:
            states: [B, T, D] at `final` and at each of the lower taps.
            position_ids: as in CarryOn.forward.
            attention_mask: as in CarryOn.forward.
            cache: the base's; layers for the carry-ons are put behind its own, and extended.
        """
        final = states["final"]
        layers = [] if cache is None else self._layers(cache)
        deltas = []
        for module in self.modules:
            own, layers = layers[: module.settings.blocks], layers[module.settings.blocks :]
            deltas.append(
                module(
                    states,
                    position_ids=position_ids,
                    attention_mask=attention_mask,
                    past_key_values=None if cache is None else Cache(layers=own),
                )
            )
        delta = deltas[0] if len(deltas) == 1 else torch.stack(deltas).sum(dim=0)
        if isinstance(self.alpha, float):
            return customized_states(final, delta, alpha=self.alpha).to(final.dtype)
        weighed = delta.float() * self.alpha[:, None, None]
        return customized_states(final, weighed, alpha=1.0).to(final.dtype)

    def _layers(self, cache: Cache) -> list[Any]:
        layers: list[Any] = carryon_layers(cache)
        if not layers:
            make: Any = CarryOnLayer
            layers = [make() for module in self.modules for _ in range(module.settings.blocks)]
            for layer in layers:
                layer.begun_by = self
            cache.layers.extend(layers)
        return layers


def get_correction(
    carryons: CarryOnSet,
    names: Sequence[str | None] | Tensor | None,
    alpha: float | Sequence[float] | Tensor | None,
    *,
    cache: Cache | None,
    num_rows: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Correction | None:
    """Return what corrects a batch; None where nothing does, so that it is the base's own.

    Args:
        carryons: those that are loaded.
        names: for each row a name or None, or slots [B]; see CarryOnSet.slots.
        alpha: see CarryOnSet.strengths.
        cache: what the batch goes on from.
        num_rows: B.
        device: where the base runs.
        dtype: what it computes in.

    Raises:
        InputError: not one for each row, an unknown name, alpha out of range, or a cache that is
            static or was begun with other carry-ons.
    """
    begun = None if cache is None else _begun_by(cache)
    slots = carryons.slots(names, num_rows=num_rows)
    strengths = carryons.strengths(alpha, slots)
    if not any(strengths):
        return None
    used = tuple(slots[:1] if len(set(slots)) == 1 else slots)
    if cache is not None:
        _check_cache(cache, used)
    if begun is None:
        modules: Sequence[CarryOn] = carryons.modules(used, device=device, dtype=dtype)
    else:
        modules = begun.modules
    return Correction(
        slots=used,
        modules=modules,
        alpha=strengths[0]
        if len(set(strengths)) == 1
        else torch.tensor(strengths, dtype=torch.float32, device=device),
    )


def carryon_layers(cache: Cache) -> list[CarryOnLayer]:
    """Return the layers of `cache` that belong to carry-ons."""
    return [layer for layer in cache.layers if isinstance(layer, CarryOnLayer)]


def _begun_by(cache: Cache) -> Correction | None:
    return next((layer.begun_by for layer in carryon_layers(cache)), None)


def _check_cache(cache: Cache, slots: tuple[int, ...]) -> None:
    if any(layer.is_compileable for layer in cache.layers):
        raise InputError(
            "past_key_values: expected a cache that grows, got a static one; leave out "
            "cache_implementation"
        )
    seen = carryon_layers(cache)
    num_seen = seen[0].get_seq_length() if seen else 0
    if num_seen != cache.get_seq_length():
        raise InputError(
            f"past_key_values: expected {cache.get_seq_length()} tokens seen by the carry-on "
            f"as by the base, got {num_seen}; start a cache with the alpha it goes on with, "
            "as alpha 0 leaves the carry-on out"
        )
    if seen and seen[0].begun_by.slots != slots:
        raise InputError(
            "past_key_values: expected the carry-ons that the cache was begun with, row by row, "
            "got others; start a cache of its own for them"
        )
