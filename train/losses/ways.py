"""Ways of a CPU to compute the softmax over rows of the frozen head, and the mean of the rows.

All give the same values to rounding; which is the fastest differs fourfold between CPUs, so that
calibration.py times them.

A CPU rounds the products of bfloat16 to it: a logit of 20 is off by up to 0.06. So some ways
subtract, inside the product and before it is rounded, a lower bound of the log-sum-exp. Then only
improbable rows have large values, and the errors of the probable ones are ten times smaller.
Letters: C positions, R rows of a block, D base width.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from carryon.train.losses.block_softmax import (
    BlockSoftmax,
    block_logits,
    block_softmax,
    by_attention,
    has_kernel,
)
from carryon.train.losses.frozen_head import FrozenHead, HeadBlock

_LARGE = 32_768
"""Rows from which the time of an evaluation during a run matters."""
Way = Callable[[Tensor, HeadBlock, FrozenHead, Tensor], BlockSoftmax]
"""From states [C, D] of the head's dtype, the rows, the head, and a lower bound [C] float32 of the
log-sum-exp over all rows (the logit of the target, at least) to the softmax with its mean."""

_FIRST_ROWS = 512
"""Rows whose log-sum-exp is the first lower bound: a hundredth of one product."""


def attention(states: Tensor, block: HeadBlock, head: FrozenHead, floors: Tensor) -> BlockSoftmax:
    """Use torch's attention kernel: both products and the softmax in cache, logits in float32."""
    if has_kernel(head):
        return by_attention(states, block, head)
    return plain(states, block, head, floors)


def plain(states: Tensor, block: HeadBlock, head: FrozenHead, floors: Tensor) -> BlockSoftmax:
    """Multiply in the head's dtype; all else is float32."""
    return block_softmax(states, block, head, with_mean=True)


def float32(states: Tensor, block: HeadBlock, head: FrozenHead, floors: Tensor) -> BlockSoftmax:
    """Multiply in float32, with a copy of the block."""
    rows = block.weight.float()
    logits = torch.mm(states.float(), rows.t())
    if block.bias is not None:
        logits.add_(block.bias)
    top, weights, sums = _exponentials_(logits.mul_(head.logit_scale))
    return BlockSoftmax(log_sum=sums.log().add_(top)[:, 0], mean=torch.mm(weights, rows).div_(sums))


def shifted(states: Tensor, block: HeadBlock, head: FrozenHead, floors: Tensor) -> BlockSoftmax:
    """Multiply in the head's dtype, rounded relative to `floors`; exponentials in float32."""
    shifts, logits = _shifted_logits(states, block, head, floors)
    logits = logits.float()
    if block.bias is not None:
        logits.add_(block.bias)
    if head.logit_scale != 1:
        logits.mul_(head.logit_scale)
    top, weights, sums = _exponentials_(logits)
    mean = torch.mm(weights.to(head.dtype), block.weight).float().div_(sums)
    log_sum = sums.log().add_(top).add_(shifts, alpha=head.logit_scale)
    return BlockSoftmax(log_sum=log_sum[:, 0], mean=mean)


def rounded(states: Tensor, block: HeadBlock, head: FrozenHead, floors: Tensor) -> BlockSoftmax:
    """As `shifted`, with exponentials rounded to the head's dtype, and summed in float32."""
    shifts, logits = _shifted_logits(states, block, head, floors)
    top, weights, sums = _exponentials_(logits)
    mean = torch.mm(weights, block.weight).float().div_(sums)
    return BlockSoftmax(log_sum=sums.log().add_(top).add_(shifts)[:, 0], mean=mean)


WAYS: Mapping[str, Way] = {
    "attention": attention,
    "float32": float32,
    "shifted": shifted,
    "rounded": rounded,
    "plain": plain,
}
"""Ways by name, the most exact first."""


def ways_of(head: FrozenHead) -> list[str]:
    """Return the names of the ways that can multiply a head, most exact first.

    The first is what runs used before there was a choice.
    """
    names = ["attention"]
    if head.device.type != "cpu" or head.softcap is not None or head.is_wide:
        return names
    if head.logit_scale <= 0 or head.gradient_filter > 0:
        return names
    if head.dtype == torch.float32:
        return [*names, "shifted", "plain"]
    is_simple = head.bias is None and head.logit_scale == 1
    return [*names, "float32", "shifted", *(["rounded"] if is_simple else []), "plain"]


def shifts_log_sums(head: FrozenHead) -> bool:
    """Return whether `shifted_log_sums` computes losses without gradient."""
    if not head.is_rough or head.vocab_size < _LARGE:
        return False
    is_plain = head.device.type == "cpu" and head.softcap is None and head.logit_scale > 0
    return is_plain and head.dtype == torch.bfloat16


def shifted_log_sums(
    states: Tensor, block: HeadBlock, head: FrozenHead, floors: Tensor
) -> BlockSoftmax:
    """Return the log-sum-exp without the mean, rounded as in `shifted`: one product, not two."""
    shifts, logits = _shifted_logits(states, block, head, floors)
    logits = logits.float()
    if block.bias is not None:
        logits.add_(block.bias)
    if head.logit_scale != 1:
        logits.mul_(head.logit_scale)
    sums = logits.logsumexp(dim=1).add_(shifts[:, 0], alpha=head.logit_scale)
    return BlockSoftmax(log_sum=sums, mean=None)


def way_of(head: FrozenHead) -> str:
    """Return the way in which a head is multiplied: its own, or the only one that it allows."""
    return head.way if head.way in ways_of(head) else "attention"


def rounds_logits(way: str, head: FrozenHead) -> bool:
    """Return whether a way rounds logits as they are, so that the target's is rounded as well."""
    return way == "plain" or (way == "attention" and not has_kernel(head))


def _shifted_logits(
    states: Tensor, block: HeadBlock, head: FrozenHead, floors: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what is subtracted, [C, 1] float32, and the products less that, [C, R]."""
    if block.first == 0:  # before, there is only the target, which may be improbable
        floors = torch.maximum(floors, _log_sum_of_some(states, block, head))
    shifts = (floors / head.logit_scale).to(head.dtype).unsqueeze(1)
    return shifts.float(), torch.addmm(shifts.neg(), states, block.weight.t())


def _log_sum_of_some(states: Tensor, block: HeadBlock, head: FrozenHead) -> Tensor:
    """Return the log-sum-exp over the first rows of a block, [C]."""
    bias = None if block.bias is None else block.bias[:_FIRST_ROWS]
    some = replace(block, weight=block.weight[:_FIRST_ROWS], bias=bias)
    return block_logits(states, some, head, with_slopes=False)[0].logsumexp(dim=1)


def _exponentials_(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's maximum, exp(logit - maximum) in place, and its sum; [C, 1] in float32."""
    top = logits.amax(dim=1, keepdim=True)
    weights = logits.sub_(top).exp_()
    return top.float(), weights, weights.sum(dim=1, keepdim=True, dtype=torch.float32)
