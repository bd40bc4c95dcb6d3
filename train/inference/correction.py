"""Correct the base's last hidden state with the carry-ons of a batch, and keep their cache.

Letters: B rows, T positions, D base width.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from carryon.cache.base.architecture import Architecture
from carryon.cache.base.hooks import watch_taps
from carryon.cache.device import to_device
from carryon.cache.errors import InputError
from carryon.train.inference.adapters import Alpha, CarryOnSet, Names
from carryon.train.modules.carryon import CarryOn, customized_states


class CarryOnLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A cache layer of a carry-on's body; its class tells it from the base's layers."""

    started_by: "Correction"
    """The correction that was in force when the cache was created."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """The carry-ons of a batch's rows, and their strengths."""

    slots: tuple[int, ...]
    """Slot of each row; a single one where all rows have the same."""
    modules: Sequence[CarryOn]
    """One for each shape; their deltas are summed."""
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

        `states` are [B, T, D] at `final` and at each lower tap; the rest is as in
        Bottleneck.forward. Layers of the carry-ons are appended to the base's `cache`.
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
        weighted = delta.float() * self.alpha[:, None, None]
        return customized_states(final, weighted, alpha=1.0).to(final.dtype)

    def _layers(self, cache: Cache) -> list[Any]:
        layers: list[Any] = carryon_layers(cache)
        if not layers:
            make: Any = CarryOnLayer
            layers = [make() for module in self.modules for _ in range(module.settings.blocks)]
            for layer in layers:
                layer.started_by = self
            cache.layers.extend(layers)
        return layers


def get_correction(
    carryons: CarryOnSet,
    names: Names,
    alpha: Alpha,
    *,
    cache: Cache | None,
    num_rows: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Correction | None:
    """Return what corrects a batch of B rows that continues `cache`; None if no row is corrected.

    Raises:
        InputError: not one for each row, an unknown name, alpha out of range, or a cache that is
            static or was started with other carry-ons.
    """
    slots, strengths = carryons.resolve(names, alpha, num_rows=num_rows)
    if not any(strengths):
        return None
    used = tuple(slots[:1] if len(set(slots)) == 1 else slots)
    layers = [] if cache is None else carryon_layers(cache)
    if cache is not None:
        _check_cache(cache, layers, used)
    if layers:  # a carry-on of theirs may have been dropped since
        modules = layers[0].started_by.modules
    else:
        modules = carryons.modules(used, device=device, dtype=dtype)
    is_one = len(set(strengths)) == 1
    each = (
        strengths[0] if is_one else to_device(torch.tensor(strengths, dtype=torch.float32), device)
    )
    return Correction(slots=used, modules=modules, alpha=each)


@contextmanager
def correcting(
    architecture: Architecture,
    correction: Correction | None,
    *,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
) -> Iterator[None]:
    """Replace the last states of the base by the customized ones, where this thread runs it.

    Args:
        architecture: of the base.
        correction: of the batch. None: nothing is replaced.
        position_ids: as in `Correction.apply`.
        attention_mask: likewise.

    Raises:
        InputError: the mask is not one of tokens.
    """
    if correction is None:
        yield
        return
    if attention_mask is not None and attention_mask.ndim != 2:
        raise InputError(
            "attention_mask: expected 0 and 1 for each token, [B, T], got "
            f"{attention_mask.ndim} dimensions"
        )
    states: dict[str, Tensor] = {}
    thread = threading.get_ident()  # other threads may run the same base

    def correct(module: nn.Module, args: tuple[object, ...], output: Any) -> None:  # noqa: ANN401
        if threading.get_ident() != thread:
            return
        final = output.last_hidden_state
        # From other devices, of a base that is spread over several.
        lower = {tap: each.to(final.device) for tap, each in states.items()}
        positions, mask = (
            None if each is None else each.to(final.device)
            for each in (position_ids, attention_mask)
        )
        output["last_hidden_state"] = correction.apply(
            lower | {"final": final},
            position_ids=positions,
            attention_mask=mask,
            cache=output.get("past_key_values"),
        )

    with (
        watch_taps(architecture, correction.lower_taps, states.__setitem__),
        architecture.decoder.register_forward_hook(correct),
    ):
        yield


def carryon_layers(cache: Cache) -> list[CarryOnLayer]:
    """Return the layers of `cache` that belong to carry-ons."""
    return [layer for layer in cache.layers if isinstance(layer, CarryOnLayer)]


def _check_cache(cache: Cache, layers: Sequence[CarryOnLayer], slots: tuple[int, ...]) -> None:
    if any(layer.is_compileable for layer in cache.layers):
        raise InputError(
            "past_key_values: expected a cache that grows, got a static one. Fix: leave out "
            "cache_implementation"
        )
    num_cached = layers[0].get_seq_length() if layers else 0
    if num_cached != cache.get_seq_length():
        raise InputError(
            f"past_key_values: expected {cache.get_seq_length()} tokens cached for the carry-on "
            f"as for the base, got {num_cached}. Fix: use one alpha for the whole cache, as alpha "
            "0 skips the carry-on"
        )
    if layers and layers[0].started_by.slots != slots:
        raise InputError(
            "past_key_values: expected the carry-ons that the cache was started with, row by row, "
            "got others. Fix: start another cache for them"
        )
