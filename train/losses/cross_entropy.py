"""Exact cross-entropy over the full vocabulary against a frozen head, in chunks.

Since the head is frozen, the gradient to the hidden states is computed in the forward pass, and
nothing of size [M, V] ever exists. One pass over the head, in blocks of rows (frozen_head.py), and
for each block over the positions, in chunks. On an accelerator a block is the whole head and only
positions are chunked; with the head in host memory or in a file, a block is one transfer.
Losses and sums are float32 whatever the dtype of the matrix products.

Letters: M supervised positions, D base width, V vocabulary, C positions of a chunk.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from carryon.cache.device import rows_at_once
from carryon.train.losses.block_softmax import block_logits, block_softmax, cap_, has_kernel, join_
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.gradient_filter import POSITIONS_AT_ONCE, filtered_softmax
from carryon.train.losses.ways import (
    WAYS,
    rounds_logits,
    shifted_log_sums,
    shifts_log_sums,
    way_of,
)


def token_losses(states_MD: Tensor, targets_M: Tensor, *, head: FrozenHead, chunk: int) -> Tensor:
    """Return the cross-entropy of each position, [M] float32, differentiable in the states.

    With gradients enabled the gradient to the states is computed here and kept: one more
    [M, D] float32.

    Args:
        states_MD: [M, D], any float type; cast to the head's dtype for the products.
        targets_M: [M] int64, token ids.
        head: the frozen head.
        chunk: positions whose logits exist at one time.
    """
    needs_gradient = torch.is_grad_enabled() and states_MD.requires_grad
    with torch.no_grad():
        losses, gradient = _cross_entropy(
            states_MD, targets_M, head, chunk, with_gradient=needs_gradient
        )
    return losses if gradient is None else _differentiable(losses, states_MD, gradient)


def base_divergences(states_MD: Tensor, base_MD: Tensor, *, head: FrozenHead, chunk: int) -> Tensor:
    """Return KL(base || customized model) at each position, [M] float32, from their states.

    Differentiable in `states_MD`, as `token_losses` is; not in `base_MD`.
    """
    with torch.no_grad():
        divergences, gradient = _divergence(states_MD, base_MD, head, chunk)
    if not (torch.is_grad_enabled() and states_MD.requires_grad):
        return divergences
    return _differentiable(divergences, states_MD, gradient)


def _differentiable(values: Tensor, states: Tensor, gradient: Tensor) -> Tensor:
    """Return `values` [M] as a function of `states` [M, D] with this gradient."""
    out: Tensor = _KnownGradient.apply(states, values, gradient)  # type: ignore[no-untyped-call]
    return out


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, values: Tensor, gradient: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(gradient)
        ctx.states_dtype = states.dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        # In place: a second backward pass would be wrong, and torch refuses it.
        return gradient.mul_(grads[0].unsqueeze(1)).to(ctx.states_dtype), None, None


def _cross_entropy(
    states: Tensor, targets: Tensor, head: FrozenHead, chunk: int, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    states = states.to(head.dtype)
    log_sums = torch.empty(len(states), dtype=torch.float32, device=states.device)
    means = torch.empty_like(states, dtype=torch.float32) if with_gradient else None
    is_filtered = with_gradient and head.gradient_filter > 0
    is_shifted = not with_gradient and shifts_log_sums(head)
    way = way_of(head) if with_gradient else "attention"
    needs_floors = is_filtered or is_shifted or way != "attention"
    head = replace(head, way=way)
    if needs_floors or (not with_gradient and head.device.type == "cpu"):
        chunk = min(chunk, POSITIONS_AT_ONCE)
    if needs_floors:
        floors = _least_log_sums(states, targets, head)
    for block in head.blocks():
        for part in _slices(len(states), chunk):
            if needs_floors and block.first > 0:
                torch.maximum(floors[part], log_sums[part], out=floors[part])
            if is_filtered:
                softmax = filtered_softmax(states[part], block, head, floors=floors[part])
            elif is_shifted:
                softmax = shifted_log_sums(states[part], block, head, floors[part])
            elif way != "attention":
                softmax = WAYS[way](states[part], block, head, floors[part])
            else:
                softmax = block_softmax(states[part], block, head, with_mean=with_gradient)
            join_(log_sums[part], None if means is None else means[part], softmax, block)
    for part in _slices(len(states), rows_at_once(len(states), states.device)):
        rows = head.rows(targets[part]).float()
        logits, slopes = _target_logits(
            states[part], rows, targets[part], head,
            is_rounded=not is_shifted and rounds_logits(way, head),
        )  # fmt: skip
        log_sums[part] -= logits
        if means is not None:  # softmax - 1 at the target, softmax elsewhere
            means[part] -= rows if slopes is None else rows.mul_(slopes.unsqueeze(1))
            means[part] *= head.logit_scale
    return log_sums, means


def _least_log_sums(states: Tensor, targets: Tensor, head: FrozenHead) -> Tensor:
    """Return a lower bound of each log-sum-exp, the target's logit, [M] float32."""
    floors = torch.empty(len(states), dtype=torch.float32, device=states.device)
    for part in _slices(len(states), rows_at_once(len(states), states.device)):
        rows = head.rows(targets[part]).float()
        floors[part], _ = _target_logits(
            states[part], rows, targets[part], head, is_rounded=not has_kernel(head)
        )
    return floors


def _target_logits(
    states: Tensor, rows: Tensor, targets: Tensor, head: FrozenHead, *, is_rounded: bool
) -> tuple[Tensor, Tensor | None]:
    logits = (states.float() * rows).sum(dim=1)
    if is_rounded and head.device.type == "cpu":
        logits = logits.to(head.dtype).float()  # as a CPU's plain product has them
    if head.bias is not None:
        logits = logits + head.bias[targets]
    return cap_(logits * head.logit_scale, head.softcap, with_slopes=True)


def _divergence(
    states: Tensor, base: Tensor, head: FrozenHead, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return sum of p_base (z_base - z) + log-sum-exp(z) - log-sum-exp(z_base), and its gradient.

    z are logits. The sum consists of small differences, hence from the logits themselves.
    """
    states, base = states.to(head.dtype), base.to(head.dtype)
    log_sums, base_log_sums = _empty_log_sums(states), _empty_log_sums(states)
    shifts = torch.zeros_like(log_sums)  # sum of p_base (z_base - z)
    means = torch.zeros_like(states, dtype=torch.float32)
    base_means = torch.zeros_like(means)  # sum of p_base * slope of z * row
    for block in head.blocks():
        for part in _slices(len(states), chunk):
            logits, slopes = block_logits(states[part], block, head, with_slopes=True)
            base_logits, _ = block_logits(base[part], block, head, with_slopes=False)
            log_sum, base_log_sum = logits.logsumexp(dim=1), base_logits.logsumexp(dim=1)
            base_p = (base_logits - base_log_sum.unsqueeze(1)).exp_()
            shift = (base_p * base_logits.sub_(logits)).sum(dim=1)
            p = logits.sub_(log_sum.unsqueeze(1)).exp_()
            if slopes is not None:
                p, base_p = p.mul_(slopes), base_p.mul_(slopes)
            for total, total_mean, new, weights in (
                (log_sums, means, log_sum, p),
                (base_log_sums, base_means, base_log_sum, base_p),
            ):
                ratio = torch.sigmoid(new - total[part]).unsqueeze(1)
                mean = torch.mm(weights.to(head.dtype), block.weight)
                total_mean[part].lerp_(mean.float(), ratio)
            shifts[part].lerp_(shift, torch.sigmoid(base_log_sum - base_log_sums[part]))
            log_sums[part] = torch.logaddexp(log_sums[part], log_sum)
            base_log_sums[part] = torch.logaddexp(base_log_sums[part], base_log_sum)
    gradient = means.sub_(base_means).mul_(head.logit_scale)
    return shifts + log_sums - base_log_sums, gradient


def _empty_log_sums(states: Tensor) -> Tensor:
    return torch.full((len(states),), -torch.inf, dtype=torch.float32, device=states.device)


def _slices(length: int, size: int) -> Iterator[slice]:
    for first in range(0, length, size):
        yield slice(first, min(first + size, length))
