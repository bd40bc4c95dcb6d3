"""Softmax over some rows of the frozen head: its log-sum-exp and the mean of the rows under it.

The gradient of a log-sum-exp of logits is the mean of the head's rows, weighted by the softmax:
attention with the states as queries and the head as keys and values. So on a CPU, for a head
without a soft cap, torch's attention kernel does both products and the softmax in cache, with
logits in float32, and writes nothing of size [C, rows]. Elsewhere the logits of the block are
computed; so they are for a wide head in float32, where the products take nearly all of the time.

Results of two blocks are joined by their log-sum-exps, so one pass covers the whole vocabulary.
Letters: C positions, D base width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from carryon.cache.device import rows_at_once
from carryon.train.losses.frozen_head import FrozenHead, HeadBlock


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockSoftmax:
    """The softmax of some positions over some rows."""

    log_sum: Tensor
    """[C] float32: log of the sum of exp(logit)."""
    mean: Tensor | None
    """[C, D]: sum of softmax * slope * row, the gradient of `log_sum` to the states up to the
    logit scale. None if not needed, or still to be computed from `weights`."""
    weights: Tensor | None = None
    """[C, rows] float32: softmax * slope."""


def block_softmax(
    states: Tensor, block: HeadBlock, head: FrozenHead, *, with_mean: bool
) -> BlockSoftmax:
    """Return the softmax of `states` [C, D], of the head's dtype, over the rows of `block`."""
    # Without the mean the kernel's second product is wasted, but in bfloat16 its logits are better.
    if has_kernel(head) and (with_mean or head.dtype != torch.float32):
        return by_attention(states, block, head)
    logits, slopes = block_logits(states, block, head, with_slopes=with_mean)
    if logits.device.type != "cpu":
        return _in_one_kernel(logits, slopes, block, head, with_mean=with_mean)
    log_sum = torch.logsumexp(logits, dim=1)
    if not with_mean:
        return BlockSoftmax(log_sum=log_sum, mean=None)
    weights = logits.sub_(log_sum.unsqueeze(1)).exp_()
    if slopes is not None:
        weights.mul_(slopes)
    if head.dtype == torch.float32:
        return BlockSoftmax(log_sum=log_sum, mean=None, weights=weights)
    return BlockSoftmax(log_sum=log_sum, mean=torch.mm(weights.to(head.dtype), block.weight))


def _in_one_kernel(
    logits: Tensor, slopes: Tensor | None, block: HeadBlock, head: FrozenHead, *, with_mean: bool
) -> BlockSoftmax:
    """Return the softmax of `logits`, which are overwritten.

    An accelerator spends more time on passes over the logits than on the products: logsumexp and
    the weights take twice as many as log_softmax.
    """
    top = logits.amax(dim=1)
    logs = torch.log_softmax(logits, dim=1, out=logits)
    log_sum = top - logs.amax(dim=1)
    if not with_mean:
        return BlockSoftmax(log_sum=log_sum, mean=None)
    if slopes is not None or head.dtype == torch.float32:
        weights = logs.exp_() if slopes is None else logs.exp_().mul_(slopes)
        if head.dtype == torch.float32:
            return BlockSoftmax(log_sum=log_sum, mean=None, weights=weights)
        weights = weights.to(head.dtype)
    else:
        weights = torch.exp(logs, out=torch.empty_like(logs, dtype=head.dtype))
    return BlockSoftmax(log_sum=log_sum, mean=torch.mm(weights, block.weight))


def has_kernel(head: FrozenHead) -> bool:
    """Return whether torch's attention kernel for CPUs multiplies this head."""
    return (
        head.way == "attention"
        and head.device.type == "cpu"
        and head.softcap is None
        and not head.is_wide
        and hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    )


def by_attention(states: Tensor, block: HeadBlock, head: FrozenHead) -> BlockSoftmax:
    """Return the softmax by torch's attention kernel for CPUs; see `has_kernel`."""
    rows = block.weight[None, None]
    bias = None
    if block.bias is not None:
        bias = (block.bias * head.logit_scale).expand(1, 1, len(states), -1)
    mean, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        states[None, None], rows, rows, 0.0, False, attn_mask=bias, scale=head.logit_scale
    )
    return BlockSoftmax(log_sum=log_sum[0, 0], mean=mean[0, 0])


def block_logits(
    states: Tensor, block: HeadBlock, head: FrozenHead, *, with_slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Return logits [C, rows] float32, and the slope of the soft cap at each, if there is one."""
    if states.device.type == "cuda" and head.dtype == torch.bfloat16:
        logits = torch.mm(states, block.weight.t(), out_dtype=torch.float32)
    else:  # a CPU rounds the products of bfloat16 to it
        logits = torch.mm(states, block.weight.t()).float()
    if block.bias is not None:
        logits.add_(block.bias)
    if head.logit_scale != 1:
        logits.mul_(head.logit_scale)
    return cap_(logits, head.softcap, with_slopes=with_slopes)


def cap_(
    logits: Tensor, softcap: float | None, *, with_slopes: bool
) -> tuple[Tensor, Tensor | None]:
    """Cap scaled logits in place: c tanh(z / c), whose slope is 1 - tanh(z / c)^2."""
    if softcap is None:
        return logits, None
    tanh = logits.div_(softcap).tanh_()
    slopes = 1 - tanh * tanh if with_slopes else None
    return logits.mul_(softcap), slopes


def join_(log_sum: Tensor, mean: Tensor | None, part: BlockSoftmax, block: HeadBlock) -> None:
    """Join the softmax over the rows of `block` to `log_sum` [C] and `mean` [C, D], both float32.

    The first block overwrites them.
    """
    part_sum = part.log_sum + block.log_weight if block.log_weight else part.log_sum
    if block.first == 0:
        log_sum.copy_(part_sum)
        if mean is not None and part.mean is not None:
            mean.copy_(part.mean)
        elif mean is not None and part.weights is not None:
            torch.mm(part.weights, block.weight, out=mean)
        return
    if mean is not None:
        ratio = torch.sigmoid(part_sum - log_sum).unsqueeze(1)
        if part.mean is not None:
            rows = rows_at_once(len(mean), mean.device)
            parts = (torch.split(x, rows) for x in (mean, part.mean, ratio))
            for total, new, weight in zip(*parts, strict=True):
                total.lerp_(new.float(), weight)
        elif part.weights is not None:
            mean.mul_(1 - ratio).addmm_(part.weights.mul_(ratio), block.weight)
    torch.logaddexp(log_sum, part_sum, out=log_sum)
