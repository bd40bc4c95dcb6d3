"""Softmax over rows of the frozen head whose mean leaves out rows of negligible probability.

Once a carry-on has learned a little, all but a few probabilities of a position are negligible. The
log-sum-exp covers every row, exactly. The mean of the rows, which is the gradient, multiplies only
rows whose probability reaches a threshold, some hundred for each position: a sparse sum instead of
the second matrix product. The mean row of the whole head stands in for what is left out: adding a
constant to all rows changes no gradient (softmax minus target sums to 0), so the error counts from
the mean row.

The bound: a position's gradient is off by at most `FrozenHead.logit_scale` times the probability
left out times `farthest_from_mean`. Letters: C positions, R rows of a block, D width.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from carryon.train.losses.block_softmax import BlockSoftmax, block_logits
from carryon.train.losses.frozen_head import FrozenHead, HeadBlock

POSITIONS_AT_ONCE = 512
"""Positions whose logits, a few MB, stay in a CPU's cache from one pass to the next."""
_MOST_SPARSE = 0.1
"""Fraction of weights above which the matrix product is faster than the sparse sum."""


def filtered_softmax(
    states: Tensor, block: HeadBlock, head: FrozenHead, *, floors: Tensor
) -> BlockSoftmax:
    """Return the softmax of `states` [C, D] over the rows of `block`, small weights left out.

    Args:
        states: of the head's dtype.
        block: the rows.
        head: with a `gradient_filter`, and the mean row.
        floors: [C] float32, a lower bound of the log-sum-exp over all rows of the head.
    """
    logits, slopes = block_logits(states, block, head, with_slopes=head.softcap is not None)
    top = logits.amax(dim=1)
    logs = torch.log_softmax(logits, dim=1, out=logits)  # in place, row by row in the cache
    log_sum = top - logs.amax(dim=1)
    least = math.log(head.gradient_filter) + (torch.maximum(floors, log_sum) - log_sum)
    places = _places(logs >= least.unsqueeze(1))
    if len(places) > _MOST_SPARSE * logs.numel():
        weights = logs.exp_() if slopes is None else logs.exp_().mul_(slopes)
        return BlockSoftmax(log_sum=log_sum, mean=torch.mm(weights.to(head.dtype), block.weight))
    kept = logs.flatten()[places].exp_()
    bounds = torch.arange(len(states) + 1, device=places.device) * len(block.weight)
    starts = torch.searchsorted(places, bounds)
    sums = torch.segment_reduce(kept, "sum", lengths=starts.diff(), unsafe=True)
    if slopes is not None:
        kept *= slopes.flatten()[places]
    mean = nn.functional.embedding_bag(
        places % len(block.weight),
        block.weight,
        starts,
        mode="sum",
        per_sample_weights=kept.to(head.dtype),
        include_last_offset=True,
    ).float()
    assert head.mean_row is not None
    return BlockSoftmax(log_sum=log_sum, mean=mean.addr_((1 - sums).clamp_(min=0), head.mean_row))


def farthest_from_mean(head: FrozenHead) -> float:
    """Return the largest distance of a row from the mean row.

    A soft cap scales a row by 0 to 1, so that the distance of 0 counts as well.
    """
    assert head.mean_row is not None
    far = max(
        float((block.weight.float() - head.mean_row).norm(dim=1).max()) for block in head.blocks()
    )
    return far if head.softcap is None else max(far, float(head.mean_row.norm()))


def _places(is_kept: Tensor) -> Tensor:
    """Return the flat indices where `is_kept` [C, R] is true, int64."""
    if is_kept.device.type == "cpu":  # four times as fast as torch.nonzero
        return torch.from_numpy(np.flatnonzero(is_kept.numpy()))
    return torch.nonzero(is_kept.flatten()).squeeze(1)
