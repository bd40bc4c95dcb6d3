"""Attention over packed samples: a flat batch without padding.

A third of a batch of random samples padded to the longest would be padding. Sorting by length
avoids that, but each batch then holds one kind of text, which cost 0.26 nats of held-out loss after
an epoch of worked problems. So batches are flat, [1, N, ...], and only here, where it is cheap, are
heads spread to [B, T] rows for the kernel.
Letters: N tokens of a batch, B samples, T longest sample, H heads, K head width.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from carryon.cache.device import attention_of_any_shape, to_device
from carryon.cache.errors import InputError
from carryon.train.modules.linear import recomputed

PACKED_ATTENTION = "carryon_packed"
"""Name of this attention in transformers' table."""
_GROUPS = 4
"""Groups of heads that are computed one after another when recomputing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """The sample and position of each token of a flat batch."""

    place: Tensor
    """[N] int64: b * T + t of each token."""
    position_ids: Tensor
    """[1, N] int64: t of each token."""
    num_rows: int
    """B, or more: the last rows are empty."""
    longest: int
    """T, or more."""

    def to(self, device: torch.device) -> "Packing":
        """Return the packing on `device`, copied without a wait."""
        if device.type == "cpu":
            return self
        place, position_ids = (to_device(x, device) for x in (self.place, self.position_ids))
        return replace(self, place=place, position_ids=position_ids)


def pack(lengths: Tensor, *, num_rows: int = 0, longest: int = 0) -> Packing:
    """Return the packing of samples of `lengths` [B] int64, in order.

    Args:
        lengths: of the samples.
        num_rows: rows to spread to, at least B. 0: B.
        longest: tokens of a row, at least those of the longest sample. 0: as many.
    """
    longest = longest or int(lengths.max())
    rows = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    starts = torch.cumsum(lengths, dim=0) - lengths
    within = torch.arange(len(rows), device=lengths.device) - starts[rows]
    return Packing(
        place=rows * longest + within,
        position_ids=within[None],
        num_rows=num_rows or len(lengths),
        longest=longest,
    )


def register_packed_attention() -> None:
    """Register PACKED_ATTENTION with transformers; idempotent."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    from carryon.cache.base.pretrained import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, _attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


def unused_mask(like: Tensor) -> Tensor:
    """Return a mask that keeps transformers from building an [N, N] one for a packed batch."""
    return like.new_zeros(1, 1, 1, 1)


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    turn: Callable[[Tensor], Tensor],
    recomputes: bool,
) -> Tensor:
    """Attend within each sample, causally; returns [1, N, H, K].

    Args:
        query: [1, H, N, K], as are `key` and `value`.
        key: of as many heads.
        value: of as many heads.
        packing: which token belongs to which sample.
        turn: rotates queries and keys by their positions.
        recomputes: compute some heads at a time, and again in the backward pass.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.device.type == "cpu":
            q, k, v = q.float(), k.float(), v.float()
        return _within_samples(turn(q), turn(k), v, packing).to(query.dtype)

    if not recomputes:
        return attend(query, key, value)
    size = -(-query.shape[1] // _GROUPS)
    groups = zip(*(torch.split(x, size, dim=1) for x in (query, key, value)), strict=True)
    return torch.cat([recomputed(attend, *group) for group in groups], dim=2)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,  # noqa: ANN401 -- transformers' own, passed on
) -> tuple[Tensor, None]:
    """Attend within each sample; without a packing this is transformers' own sdpa attention."""
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    dtype = value.dtype
    if query.device.type == "cpu":  # its backward kernel takes half the time in float32
        query, key, value = query.float(), key.float(), value.float()
    else:  # autocast leaves values in bfloat16, but a rotation in float32 widens the others
        query, key = query.to(dtype), key.to(dtype)
    return _within_samples(query, key, value, packing, **kwargs).to(dtype), None


def _within_samples(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    **kwargs: Any,  # noqa: ANN401 -- of transformers' attention
) -> Tensor:
    # Padding is at the end of a row, which causal attention never reads from a real token.
    groups = query.shape[1] // key.shape[1]  # heads of the query that share one of the keys
    window = kwargs.get("sliding_window")
    band = None
    if window is not None and window < packing.longest:
        band = _seen(window, packing, query)
    if kwargs.get("s_aux") is not None:
        raise InputError("attention sinks: not supported from a store. Fix: train a bottleneck")
    q_BHTK = _spread(query, packing)
    k_BHTK = _spread(key, packing).repeat_interleave(groups, dim=1)
    v_BHTK = _spread(value, packing).repeat_interleave(groups, dim=1)
    scale, softcap = kwargs.get("scaling"), kwargs.get("softcap")
    # A compiler cannot trace the latter: who compiles this is within it.
    any_shape = nullcontext() if torch.compiler.is_compiling() else attention_of_any_shape()
    with torch.autocast(query.device.type, enabled=False), any_shape:
        if softcap is None:
            out = nn.functional.scaled_dot_product_attention(
                q_BHTK,
                k_BHTK,
                v_BHTK,
                attn_mask=band,
                is_causal=band is None,
                scale=scale,
                dropout_p=kwargs.get("dropout", 0.0),
            )
        else:  # no kernel of torch caps scores
            scores = softcap * torch.tanh(q_BHTK @ k_BHTK.mT * (scale or 1.0) / softcap)
            seen = _seen(packing.longest, packing, query) if band is None else band
            scores = scores.masked_fill(~seen, float("-inf"))
            out = scores.softmax(dim=-1, dtype=torch.float32).to(v_BHTK.dtype) @ v_BHTK
    flat = out.transpose(1, 2).flatten(0, 1)  # [B * T, H, K]
    return flat.index_select(0, packing.place)[None]


def _seen(window: int, packing: Packing, like: Tensor) -> Tensor:
    """Return a causal mask, [T, T], over the last `window` tokens including the own one."""
    at = torch.arange(packing.longest, device=like.device)
    distance = at[:, None] - at
    return (distance >= 0) & (distance < window)


def _spread(heads: Tensor, packing: Packing) -> Tensor:
    """Return [B, H, T, K] of heads [1, H, N, K]; padding is 0."""
    tokens = heads[0].transpose(0, 1)  # [N, H, K]
    rows = tokens.new_zeros(packing.num_rows * packing.longest, *tokens.shape[1:])
    rows = rows.index_copy(0, packing.place, tokens)
    return rows.view(packing.num_rows, packing.longest, *tokens.shape[1:]).transpose(1, 2)
