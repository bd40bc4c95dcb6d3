"""The kind `bottleneck`: a small causal module that corrects the base's last hidden state.

    u     = blocks(bridge(norm(x)))           decoder blocks of width d (decoder.py)
    delta = sigmoid(A u + b) * (B u)          B starts at zero: an untrained carry-on is the base
    logits = W (x + alpha * delta)            W is the base's frozen head, not part of this module

Each tap has its own norm and bridge; with several, a learned softmax over taps weighs them for
each token. Taps of other bases have their own too; what these bridges give is added, which is one
bridge from all their normed states side by side. The corrected state is always that of the tap
`final`, which feeds the head.

Letters: B rows, T positions, N tokens of a flat batch, D base width, d carry-on width, K taps, M
chosen positions.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from carryon.cache.errors import InputError
from carryon.train.config import CarryOnSettings
from carryon.train.modules.carryon import CarryOn
from carryon.train.modules.decoder import NORM_EPS, Decoder
from carryon.train.modules.linear import Product, gated_product, product, recomputed
from carryon.train.modules.packed_attention import Packing


class Bottleneck(CarryOn):
    """Decoder blocks of a small width between a bridge and an output map."""

    def __init__(
        self,
        settings: CarryOnSettings,
        *,
        base_width: int,
        sources: Mapping[str, int] | None = None,
    ) -> None:
        """Draw the weights from torch's global generator; the output map is zero.

        Args:
            settings: kind and shape.
            base_width: D.
            sources: taps of other bases that it also reads -> their widths.
        """
        super().__init__()
        self.sources = dict(sources or {})
        self.settings = settings
        self.base_width = base_width
        width, num_taps = settings.width, len(settings.taps)
        self.norms = nn.ModuleList(nn.RMSNorm(base_width, eps=NORM_EPS) for _ in settings.taps)
        self.bridges = nn.ModuleList(Product(base_width, width, bias=False) for _ in settings.taps)
        self.mixer = nn.Linear(num_taps * width, num_taps) if num_taps > 1 else None
        self.body: Any = Decoder(
            width=width,
            blocks=settings.blocks,
            heads=settings.heads,
            intermediate_size=settings.intermediate_size,
        )
        gate_width = {"channel": base_width, "token": 1, "none": 0}[settings.gate]
        self.gate = Product(width, gate_width) if gate_width else None
        self.up = Product(width, base_width, bias=False)
        self.dropout = nn.Dropout(settings.dropout)
        widths = self.sources.values()  # drawn last: its other weights are those of one base
        self.source_norms = nn.ModuleList(nn.RMSNorm(each, eps=NORM_EPS) for each in widths)
        self.source_bridges = nn.ModuleList(Product(each, width, bias=False) for each in widths)
        nn.init.zeros_(self.up.weight)
        for layer in (self.mixer, self.gate):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        states: Mapping[str, Tensor],
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,  # noqa: ANN401 -- a Cache of transformers
    ) -> Tensor:
        """Return the correction delta to the `final` states, before alpha.

        Args:
            states: [B, T, D] for each tap of the settings.
            position_ids: [B, T] or [1, T] int64, for the rotary embedding. None: they follow those
                in the cache.
            attention_mask: [B, T_all] 1 where a token is real, for rows padded on the left.
            past_key_values: a cache with a layer for each block, or one that grows; it is extended.

        Returns:
            [B, T, D] in the type of the weights.
        """
        entrance_BTd = self.dropout(self._enter(states)[0])
        u_BTd = self.body(
            inputs_embeds=entrance_BTd,
            position_ids=position_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        return self._leave(u_BTd)

    def correct_packed(
        self, states: Mapping[str, Tensor], packing: Packing, positions_M: Tensor
    ) -> Tensor:
        """Return delta at chosen tokens, [M, D]; see CarryOn."""
        entrance_Nd = self.dropout(self._enter(states)[0])
        u_Nd = self.body(
            inputs_embeds=entrance_Nd[None], position_ids=packing.position_ids, packing=packing
        )[0]
        return self._leave(u_Nd[positions_M])

    def _leave(self, u: Tensor) -> Tensor:
        u = self.dropout(u)
        if self.gate is None:
            delta: Tensor = self.up(u)
            return delta
        if not (self.body.recompute and torch.is_grad_enabled()):
            return self._gated(u)
        # Kept for the backward pass, gate and values of [M, D] would stay through the whole loss.
        return recomputed(self._gated, u)

    def _gated(self, u: Tensor) -> Tensor:
        assert self.gate is not None
        # A view, as autocast would cast a leaf once for both, and sum its gradient in bfloat16.
        return gated_product(u.view_as(u), self.gate, self.up, "sigmoid")

    def tap_ratios(self, states: Mapping[str, Tensor]) -> Tensor:
        """Return each own tap's weight for each token, [B, T, K]; they add up to 1."""
        return self._enter(states)[1]

    def _enter(self, states: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        bridged = [
            _bridge(states[tap], norm, bridge)
            for tap, norm, bridge in zip(self.settings.taps, self.norms, self.bridges, strict=True)
        ]
        if self.mixer is None:
            return self._add_sources(bridged[0], states), torch.ones_like(bridged[0][..., :1])
        ratios_BTK = torch.softmax(self.mixer(torch.cat(bridged, dim=-1)), dim=-1)
        stacked_BTKd = torch.stack(bridged, dim=-2)
        entrance_BTd = (ratios_BTK.unsqueeze(-1) * stacked_BTKd).sum(dim=-2)
        return self._add_sources(entrance_BTd, states), ratios_BTK

    def _add_sources(self, entrance_BTd: Tensor, states: Mapping[str, Tensor]) -> Tensor:
        parts = zip(self.sources, self.source_norms, self.source_bridges, strict=True)
        for tap, norm, bridge in parts:
            if tap not in states:
                raise InputError(
                    f"states: expected those of another base at {tap}, which the carry-on was "
                    f"trained on, got {', '.join(states)}"
                )
            entrance_BTd = entrance_BTd + _bridge(states[tap], norm, bridge)
        return entrance_BTd


def _bridge(x_BTD: Tensor, norm: Any, bridge: Any) -> Tensor:  # noqa: ANN401 -- or of stacked_weights
    """Return bridge(norm(x)) without a normed copy of x, which is a few times as wide as d.

    RMS norm is a factor for each token, applied after the bridge, and a weight for each channel,
    which training folds into the bridge; its gradient needs no pass over [B, T, D] either.
    """
    weight: Tensor = bridge.weight
    if not torch.is_autocast_enabled(x_BTD.device.type):
        x_BTD = x_BTD.to(weight.dtype)
    size = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True, dtype=torch.float32)
    factor = torch.rsqrt(size * size / x_BTD.shape[-1] + NORM_EPS)
    if torch.is_grad_enabled() and weight.requires_grad:
        bridged = product(x_BTD, weight, bridge.wide, scale=norm.weight)
    else:
        bridged = bridge(x_BTD * norm.weight)
    assert isinstance(bridged, Tensor)
    return (bridged.float() * factor).to(bridged.dtype)


def build_bottleneck(settings: CarryOnSettings, *, base_width: int, seed: int) -> Bottleneck:
    """Return an untrained bottleneck; equal arguments give equal bits.

    torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Bottleneck(settings, base_width=base_width)
