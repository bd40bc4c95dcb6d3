"""Exact cross-entropy over the full vocabulary against a frozen head, in chunks of tokens.

Since the head is frozen, the gradient to the hidden states is made in the forward pass, chunk by
chunk: logits of one chunk are the only thing of size V that ever exists. The log-sum-exp and the
loss are float32 whatever the matrix products are computed in.

Letters: M supervised positions, D base width, V vocabulary, C positions of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carryon.cache.head import Head

BLOCK_ROWS = 16
"""Rows of a CPU's softmax pass: 16 x 49,152 float32 logits (3 MB) stay in the cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenHead:
    """logits = cap(scale * (W x + bias)) as tensors on a device, never trained."""

    weight: Tensor
    """W, [V, D], bfloat16 or float32: the type of the matrix products."""
    bias: Tensor | None
    """[V], of the weight's type, or None."""
    logit_scale: float
    """Multiplies the logits before the cap."""
    softcap: float | None
    """Soft limit of the logits, or None."""


def frozen_head(head: Head, *, device: torch.device, dtype: torch.dtype) -> FrozenHead:
    """Return a store's head as tensors of `dtype` on `device`."""
    weight = torch.from_numpy(head.weight)
    if weight.dtype == torch.uint16:  # bfloat16 bits
        weight = weight.view(torch.bfloat16)
    bias = None if head.bias is None else torch.from_numpy(head.bias).to(device, dtype)
    return FrozenHead(
        weight=weight.to(device, dtype),
        bias=bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    )


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
        losses: Tensor = _FrozenHeadLoss.apply(states_MD, targets_M, head, chunk)  # type: ignore[no-untyped-call]
        return losses
    with torch.no_grad():
        return _losses_and_gradient(states_MD, targets_M, head, chunk, with_gradient=False)[0]


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, head: FrozenHead, chunk: int) -> Tensor:  # noqa: ANN401
        losses, gradient = _losses_and_gradient(states, targets, head, chunk, with_gradient=True)
        ctx.save_for_backward(gradient)
        ctx.states_dtype = states.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        grad_states = (gradient * grad_outputs[0].unsqueeze(1)).to(ctx.states_dtype)
        return grad_states, None, None, None


def _losses_and_gradient(
    states: Tensor, targets: Tensor, head: FrozenHead, chunk: int, *, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    num_positions, width = states.shape
    losses = torch.empty(num_positions, dtype=torch.float32, device=states.device)
    gradient = torch.empty(
        (num_positions if with_gradient else 0, width), dtype=torch.float32, device=states.device
    )
    # One buffer for all chunks: fresh pages for 50 MB would cost more than the softmax over them.
    rows = min(chunk, num_positions)
    buffer = torch.empty(
        (rows, head.weight.shape[0]), dtype=head.weight.dtype, device=states.device
    )
    for first in range(0, num_positions, chunk):
        part = slice(first, min(first + chunk, num_positions))
        logits = buffer[: part.stop - part.start]
        _logits_(states[part], head, out=logits)
        slopes = _cap_(logits, head.softcap, with_slopes=with_gradient)
        losses[part] = _softmax_(logits, targets[part])
        if with_gradient:
            gradient[part] = _gradient_(logits, slopes, targets[part], head)
    return losses, gradient


def _logits_(states: Tensor, head: FrozenHead, *, out: Tensor) -> None:
    scaled = (states.float() * head.logit_scale).to(head.weight.dtype)
    torch.mm(scaled, head.weight.t(), out=out)
    if head.bias is not None:
        out.add_(head.bias, alpha=head.logit_scale)


def _cap_(logits: Tensor, softcap: float | None, *, with_slopes: bool) -> Tensor | None:
    # cap(z) = c tanh(z / c), whose slope is 1 - tanh(z / c)^2.
    if softcap is None:
        return None
    tanh = logits.div_(softcap).tanh_()
    slopes = 1 - tanh * tanh if with_slopes else None
    logits.mul_(softcap)
    return slopes


def _softmax_(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits [C, V] into probabilities in place; return the losses [C], float32.

    The log-sum-exp needs no pass of its own: it is max - log(largest probability), and the
    largest probability is at least 1 / V.
    """
    target_logits = logits.gather(1, targets.unsqueeze(1)).squeeze(1).float()
    block_rows = BLOCK_ROWS if logits.device.type == "cpu" else len(logits)
    log_sums = torch.empty_like(target_logits)
    for first in range(0, len(logits), block_rows):
        block = logits[first : first + block_rows]
        exact = block.float()  # the block itself where it is float32
        largest = exact.amax(dim=1)
        torch.softmax(exact, dim=1, out=exact)
        log_sums[first : first + block_rows] = largest - exact.amax(dim=1).log()
        if exact.dtype != block.dtype:
            block.copy_(exact)  # bfloat16 is enough for the product that makes the gradient
    return log_sums - target_logits


def _gradient_(
    probabilities: Tensor, slopes: Tensor | None, targets: Tensor, head: FrozenHead
) -> Tensor:
    # d loss / d logits = p - 1 at the target, p elsewhere.
    probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1
    if slopes is not None:
        probabilities.mul_(slopes)
    return torch.mm(probabilities, head.weight).float() * head.logit_scale
