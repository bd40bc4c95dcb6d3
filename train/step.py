"""One step of training: gradients of a few batches, then one move of the optimizer."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from carryon.train.batch import Batch
from carryon.train.carryon import CarryOn, customized_states
from carryon.train.config import OptimizationSettings
from carryon.train.device import multiplies_bfloat16
from carryon.train.loss import FrozenHead, token_losses


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFigures:
    """What a step measured."""

    loss: float
    """Mean cross-entropy of its supervised pairs, before the move."""
    grad_norm: float
    """Norm of all gradients together, before clipping."""
    tokens: int
    """Tokens, pads not counted."""
    targets: int
    """Supervised pairs."""


class NotFiniteError(ArithmeticError):
    """Loss or gradient of a step is not finite; the weights are those of the step before."""

    def __init__(self, samples: list[int]) -> None:
        """Keep the indices of the samples to name."""
        super().__init__(f"not finite in samples {samples}")
        self.samples = samples


def build_optimizer(carryon: CarryOn, settings: OptimizationSettings) -> torch.optim.AdamW:
    """Return AdamW over the carry-on's weights; only matrices decay."""
    weights = list(carryon.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if weight.ndim >= 2]},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def take_step(
    carryon: CarryOn,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    head: FrozenHead,
    chunk: int,
    learning_rate: float,
    grad_clip: float,
) -> StepFigures:
    """Move the weights of `carryon` down the gradient of the batches' mean loss.

    Raises:
        NotFiniteError: the loss or a gradient is not finite; nothing was moved.
    """
    num_targets = sum(batch.num_targets for batch in batches)
    losses = []
    for batch in batches:
        on_device = batch.to(head.weight.device)
        batch_losses = pair_losses(carryon, on_device, head=head, chunk=chunk, alpha=1.0)
        torch.autograd.backward(batch_losses.sum() / max(1, num_targets))
        losses.append(batch_losses.detach())
    limit = grad_clip if grad_clip > 0 else float("inf")
    norm = torch.nn.utils.clip_grad_norm_(carryon.parameters(), limit)
    _check_finite(batches, losses, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    total = sum(float(part.double().sum()) for part in losses)
    return StepFigures(
        loss=total / max(1, num_targets),
        grad_norm=float(norm),
        tokens=sum(batch.num_tokens for batch in batches),
        targets=num_targets,
    )


def pair_losses(
    carryon: CarryOn, batch: Batch, *, head: FrozenHead, chunk: int, alpha: float
) -> Tensor:
    """Return the cross-entropy of the customized model at each supervised pair, [M] float32."""
    with _autocast(batch.targets.device):
        delta_MD = carryon.correct_packed(batch.states, batch.packing(), batch.positions)
    states_MD = customized_states(final_states(batch), delta_MD, alpha=alpha)
    return token_losses(states_MD, batch.targets, head=head, chunk=chunk)


def final_states(batch: Batch) -> Tensor:
    """Return the base's `final` states of the supervised pairs, [M, D] in the store's type."""
    return batch.states["final"][batch.positions]


def _autocast(device: torch.device) -> AbstractContextManager[object]:
    # On a CPU the body stays in float32: it is small beside the head.
    if device.type == "cpu" or not multiplies_bfloat16(device):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def _check_finite(batches: Sequence[Batch], losses: Sequence[Tensor], norm: Tensor) -> None:
    if all(bool(torch.isfinite(part).all()) for part in losses) and bool(torch.isfinite(norm)):
        return
    samples = {
        batch.sample_of(pair)
        for batch, part in zip(batches, losses, strict=True)
        for pair in torch.nonzero(~torch.isfinite(part)).flatten().tolist()
    }
    everyone = {sample for batch in batches for sample in batch.samples.tolist()}
    raise NotFiniteError(sorted(samples or everyone))
