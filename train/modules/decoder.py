"""The decoder blocks of a bottleneck, with the weight names and layout of transformers' Llama.

Written here because importing transformers' models takes 130 MB and seven seconds. Inputs are
padded rows [B, T, d], with a KV cache in generation, or packed samples [1, N, d] with a packing.
Letters: B rows, T positions, N tokens, d width, H heads, K head width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from carryon.train.modules.linear import Product, gated_product, recomputed
from carryon.train.modules.packed_attention import Packing, attend_packed

NORM_EPS = 1e-6
_ROTARY_BASE = 10000.0
_FIRST_WEIGHTS = 0.02  # standard deviation


class Norm(nn.Module):
    """RMS norm, computed in float32."""

    def __init__(self, width: int) -> None:
        """Start with a weight of one for each channel."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., d] in the dtype of `x`."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + NORM_EPS)
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        """Draw the weights from torch's global generator."""
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Product(width, width, bias=False) for _ in range(4)
        )

    def forward(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Return [B, T, d]; `attend` gets [B, H, T, K] three times and returns [B, T, H, K]."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.o_proj(attend(q, k, v).flatten(-2))
        return out


class Mlp(nn.Module):
    """A gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, intermediate_size: int) -> None:
        """Draw the weights from torch's global generator."""
        super().__init__()
        self.gate_proj = Product(width, intermediate_size, bias=False)
        self.up_proj = Product(width, intermediate_size, bias=False)
        self.down_proj = Product(intermediate_size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, d]."""
        out: Tensor = self.down_proj(gated_product(x, self.gate_proj, self.up_proj, "silu"))
        return out


class Layer(nn.Module):
    """A decoder block: attention, then an MLP, each after a norm and with a residual."""

    def __init__(self, width: int, heads: int, intermediate_size: int) -> None:
        """Draw the weights from torch's global generator."""
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.mlp = Mlp(width, intermediate_size)
        self.input_layernorm = Norm(width)
        self.post_attention_layernorm = Norm(width)

    def attention(self, x: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """Return [B, T, d] after the attention."""
        out: Tensor = x + self.self_attn(self.input_layernorm(x), attend)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, d] after the MLP."""
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """The blocks and a final norm."""

    def __init__(self, *, width: int, blocks: int, heads: int, intermediate_size: int) -> None:
        """Draw the weights from torch's global generator."""
        super().__init__()
        self.head_width = width // heads
        self.recompute = False
        """Keep only the inputs of attention and MLP for the backward pass."""
        embedding = nn.Embedding(1, width)  # draws as Llama does: a seed gives the same weights
        self.layers = nn.ModuleList(Layer(width, heads, intermediate_size) for _ in range(blocks))
        self.norm = Norm(width)
        nn.init.normal_(embedding.weight)
        for module in self.modules():
            if isinstance(module, Product):
                nn.init.normal_(module.weight, std=_FIRST_WEIGHTS)

    def forward(
        self,
        *,
        inputs_embeds: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,  # noqa: ANN401 -- transformers' Cache, which is not imported
        packing: Packing | None = None,
    ) -> Tensor:
        """Return [B, T, d]; arguments as in Bottleneck.forward and CarryOn.correct_packed."""
        x = inputs_embeds
        num_seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(num_seen, num_seen + x.shape[1], device=x.device)[None]
        mask = None
        if packing is None:
            mask = _mask(x.shape[1], num_seen, attention_mask, device=x.device)
        angles = self._rotary(position_ids)
        recomputes = self.recompute and torch.is_grad_enabled()

        def turn(heads: Tensor) -> Tensor:
            return _turned(heads, *angles)

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if packing is not None:
                return attend_packed(q, k, v, packing, turn=turn, recomputes=recomputes)
            q, k = turn(q), turn(k)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, number)
            out = nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1
            )
            return out.transpose(1, 2)

        for number, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            first = partial(layer.attention, attend=partial(attend, number))
            x = recomputed(layer, recomputed(first, x)) if recomputes else layer(first(x))
        out: Tensor = recomputed(self.norm, x) if recomputes else self.norm(x)
        return out

    def _rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, [B or 1, 1, T, K] float32."""
        channels = torch.arange(0, self.head_width, 2, device=position_ids.device).float()
        angles = position_ids[..., None].float() * _ROTARY_BASE ** (-channels / self.head_width)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos(), angles.sin()


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return [B, H, T, K] rotated by the angle of each position."""
    first, second = heads.chunk(2, dim=-1)
    cos, sin = cos.to(heads.dtype), sin.to(heads.dtype)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def _mask(
    num_new: int, num_seen: int, attention_mask: Tensor | None, *, device: torch.device
) -> Tensor | None:
    """Return the attention mask, [B or 1, 1, T, T_all]; None if causal attention is enough."""
    if attention_mask is None and (num_seen == 0 or num_new == 1):
        return None
    at = torch.arange(num_seen + num_new, device=device)
    own = at[num_seen:, None]
    seen = (at <= own)[None, None]
    if attention_mask is not None:
        seen = seen & (attention_mask[:, None, None, :] != 0)
    return seen | (at == own)  # a pad sees itself: no row is empty
