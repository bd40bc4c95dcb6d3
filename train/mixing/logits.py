"""Probabilities of a frozen head over its whole vocabulary, in float32.

Letters: n positions, D base width, V vocabulary.
"""

import torch
from torch import Tensor

from carryon.train.losses.block_softmax import cap_
from carryon.train.losses.frozen_head import FrozenHead


@torch.no_grad()
def log_probabilities(states: Tensor, head: FrozenHead) -> Tensor:
    """Return the log-probabilities of all tokens, [n, V] float32 on the head's device.

    A head in bfloat16 is widened block by block: a CPU would round the logits to it.

    Args:
        states: [n, D] in any float type, on any device.
        head: of the base.
    """
    wide = states.to(head.device, torch.float32)
    logits = torch.empty(len(wide), head.vocab_size, device=head.device)
    for block in head.blocks():
        rows = logits[:, block.first : block.first + len(block.weight)]
        torch.mm(wide, block.weight.float().t(), out=rows)
        if block.bias is not None:
            rows.add_(block.bias)
    if head.logit_scale != 1:
        logits.mul_(head.logit_scale)
    logits, _ = cap_(logits, head.softcap, with_slopes=False)
    return logits.sub_(torch.logsumexp(logits, dim=1, keepdim=True))
