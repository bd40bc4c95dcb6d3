"""Exact cross-entropy over the full vocabulary against a frozen head, in chunks.

Since the head is frozen, the gradient to the hidden states is made in the forward pass, and
nothing of size [M, V] ever exists. One pass over the head, in blocks of rows (frozen_head.py), and
for each block over the positions, in chunks. With the head on an accelerator a block is all of it
and chunks run over positions alone; with the head in host memory or in a file, blocks are what is
fetched at one time. Sums and losses are float32 whatever the matrix products are computed in.

Letters: M supervised positions, D base width, V vocabulary, C positions of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from carryon.train.losses.block_softmax import block_logits, block_softmax, cap_, has_kernel, join_
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.gradient_filter import POSITIONS_AT_ONCE, filtered_softmax

_ROWS_AT_ONCE = 256  # positions whose targets' rows are in float32 at one time


def token_losses(states_MD: Tensor, targets_M: Tensor, *, head: FrozenHead, chunk: int) -> Tensor:
    """Return the cross-entropy of each position, [M] float32, differentiable in the states.

    With gradients enabled the gradient to the states is computed here and kept (one more
    [M, D] float32); without them only the losses are.

    Args:
        states_MD: [M, D], any float type; cast to the head's type for the products.
        targets_M: [M] int64, token ids.
        head: the frozen head.
        chunk: positions whose logits exist at one time.
    """
    if torch.is_grad_enabled() and states_MD.requires_grad:
        losses: Tensor = _CrossEntropy.apply(states_MD, targets_M, head, chunk)  # type: ignore[no-untyped-call]
        return losses
    with torch.no_grad():
        return _cross_entropy(states_MD, targets_M, head, chunk, with_gradient=False)[0]


def base_divergences(states_MD: Tensor, base_MD: Tensor, *, head: FrozenHead, chunk: int) -> Tensor:
    """Return KL(base || customized model) at each position, [M] float32, from their states.

    Differentiable in `states_MD`, as `token_losses` is; not in `base_MD`.
    """
    if torch.is_grad_enabled() and states_MD.requires_grad:
        found: Tensor = _Divergence.apply(states_MD, base_MD, head, chunk)  # type: ignore[no-untyped-call]
        return found
    with torch.no_grad():
        return _divergence(states_MD, base_MD, head, chunk)[0]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: FrozenHead, chunk: int) -> Tensor:  # noqa: ANN401
        losses, gradient = _cross_entropy(states, targets, head, chunk, with_gradient=True)
        return _keep(ctx, states, losses, gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return _scaled_gradient(ctx, grad_outputs[0])


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, base: Tensor, head: FrozenHead, chunk: int) -> Tensor:  # noqa: ANN401
        found, gradient = _divergence(states, base, head, chunk)
        return _keep(ctx, states, found, gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        return _scaled_gradient(ctx, grad_outputs[0])


def _keep(ctx: Any, states: Tensor, values: Tensor, gradient: Tensor | None) -> Tensor:  # noqa: ANN401
    ctx.save_for_backward(gradient)
    ctx.states_dtype = states.dtype
    return values


def _scaled_gradient(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    (gradient,) = ctx.saved_tensors
    # In place: a second backward pass would be wrong, and torch refuses it.
    return gradient.mul_(grad_values.unsqueeze(1)).to(ctx.states_dtype), None, None, None


def _cross_entropy(
    states: Tensor, targets: Tensor, head: FrozenHead, chunk: int, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    states = states.to(head.dtype)
    log_sums = torch.empty(len(states), dtype=torch.float32, device=states.device)
    means = torch.empty_like(states, dtype=torch.float32) if with_gradient else None
    is_filtered = with_gradient and head.gradient_filter > 0
    if is_filtered or (not with_gradient and head.device.type == "cpu"):
        chunk = min(chunk, POSITIONS_AT_ONCE)
    if is_filtered:
        floors = _least_log_sums(states, targets, head)
    for block in head.blocks():
        for part in _slices(len(states), chunk):
            if is_filtered:
                if block.first > 0:
                    torch.maximum(floors[part], log_sums[part], out=floors[part])
                found = filtered_softmax(states[part], block, head, floors=floors[part])
            else:
                found = block_softmax(states[part], block, head, with_mean=with_gradient)
            mean = None if means is None else means[part]
            join_(log_sums[part], mean, found, block)
    for part in _slices(len(states), _ROWS_AT_ONCE):
        rows = head.rows(targets[part]).float()
        logits, slopes = _target_logits(states[part], rows, targets[part], head)
        log_sums[part] -= logits
        if means is not None:  # softmax - 1 at the target, softmax elsewhere
            means[part] -= rows if slopes is None else rows.mul_(slopes.unsqueeze(1))
            means[part] *= head.logit_scale
    return log_sums, means


def _least_log_sums(states: Tensor, targets: Tensor, head: FrozenHead) -> Tensor:
    """Return what each log-sum-exp is at least, whatever the other logits are: the target's."""
    found = torch.empty(len(states), dtype=torch.float32, device=states.device)
    for part in _slices(len(states), _ROWS_AT_ONCE):
        rows = head.rows(targets[part]).float()
        found[part], _ = _target_logits(states[part], rows, targets[part], head)
    return found


def _target_logits(
    states: Tensor, rows: Tensor, targets: Tensor, head: FrozenHead
) -> tuple[Tensor, Tensor | None]:
    logits = (states.float() * rows).sum(dim=1)
    if not has_kernel(head) and head.device.type == "cpu":
        logits = logits.to(head.dtype).float()  # as `block_logits` has it in the log-sum-exp
    if head.bias is not None:
        logits = logits + head.bias[targets]
    return cap_(logits * head.logit_scale, head.softcap, with_slopes=True)


def _divergence(
    states: Tensor, base: Tensor, head: FrozenHead, chunk: int
) -> tuple[Tensor, Tensor]:
    """Return sum of p_base (z_base - z) + log-sum-exp(z) - log-sum-exp(z_base), and its gradient.

    z are logits. The sum is of small differences, so it is made of the logits themselves.
    """
    states, base = states.to(head.dtype), base.to(head.dtype)
    log_sums, base_log_sums = _log_sums_of_nothing(states), _log_sums_of_nothing(states)
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
                share = torch.sigmoid(new - total[part]).unsqueeze(1)
                mean = torch.mm(weights.to(head.dtype), block.weight)
                total_mean[part].lerp_(mean.float(), share)
            shifts[part].lerp_(shift, torch.sigmoid(base_log_sum - base_log_sums[part]))
            log_sums[part] = torch.logaddexp(log_sums[part], log_sum)
            base_log_sums[part] = torch.logaddexp(base_log_sums[part], base_log_sum)
    gradient = means.sub_(base_means).mul_(head.logit_scale)
    return shifts + log_sums - base_log_sums, gradient


def _log_sums_of_nothing(states: Tensor) -> Tensor:
    return torch.full((len(states),), -torch.inf, dtype=torch.float32, device=states.device)


def _slices(length: int, size: int) -> Iterator[slice]:
    for first in range(0, length, size):
        yield slice(first, min(first + size, length))
