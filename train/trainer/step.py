"""One training step: gradients of a few batches, then one update by the optimizer.

Letters: M supervised pairs of a batch, D base width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carryon.train.data.batch import Batch
from carryon.train.losses.base_states import BaseStates
from carryon.train.losses.cross_entropy import base_divergences, token_losses
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.sampled_softmax import sampled_head
from carryon.train.mixing.mixture import MixedCarryOn
from carryon.train.mixing.projected import PairProjections, ProjectedSources
from carryon.train.modules.carryon import CarryOn
from carryon.train.optim.optimizer import LR_FACTOR, CompositeOptimizer
from carryon.train.trainer.distributed import gather_lists, sum_gradients_, sum_over_processes


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFigures:
    """Measurements of a step."""

    loss: float
    """Mean cross-entropy of its targets before the update, in nats."""
    grad_norm: float
    """Norm of the whole gradient, before clipping."""
    tokens: int
    targets: int


class NotFiniteError(ArithmeticError):
    """Loss or gradient of a step is not finite; the weights are those before the step."""

    def __init__(self, samples: list[int]) -> None:
        """Keep the indices of the samples to name."""
        super().__init__(f"not finite in samples {samples}")
        self.samples = samples


def take_step(
    carryon: CarryOn,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    head: FrozenHead,
    chunk: int,
    learning_rate: float,
    grad_clip: float,
    kl_weight: float = 0.0,
    base: BaseStates | None = None,
    projected: ProjectedSources | None = None,
) -> StepFigures:
    """Update the weights of `carryon` by the gradient of the batches' mean loss.

    `base` is needed with a `kl_weight` and in a mixture, `projected` in a mixture.

    Raises:
        NotFiniteError: the loss or a gradient is not finite. No weight is updated, except by an
            optimizer that steps in the backward pass, where some gradients may be finite.
    """
    num_targets, num_tokens = map(
        int,
        sum_over_processes(
            sum(batch.num_targets for batch in batches),
            sum(batch.num_tokens for batch in batches),
            device=head.device,
        ),
    )
    limit = grad_clip if grad_clip > 0 else float("inf")
    in_backward = (
        optimizer if isinstance(optimizer, CompositeOptimizer) and optimizer.in_backward else None
    )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(LR_FACTOR, 1.0)
    losses: list[Tensor] = []
    squares: list[Tensor] = []
    for number, batch in enumerate(batches):
        pairs = projected.at_pairs(batch, device=head.device) if projected else None
        batch_losses, objective = _objective(
            carryon,
            batch.to(head.device),
            head=head,
            chunk=chunk,
            kl_weight=kl_weight,
            base=base,
            pairs=pairs,
        )
        losses.append(batch_losses.detach())
        mean = objective / max(1, num_targets)
        if in_backward is not None and number == len(batches) - 1:
            if not bool(torch.isfinite(objective.detach())):
                raise NotFiniteError(_bad_samples(batches, losses))
            squares = in_backward.backward_and_move(mean, max_norm=limit)
        else:
            torch.autograd.backward(mean)
        del batch_losses, objective, mean  # and the gradient that they hold
    if in_backward is None:
        sum_gradients_(carryon.parameters())
        norm = torch.nn.utils.clip_grad_norm_(carryon.parameters(), limit)
    else:
        norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
    [total] = sum_over_processes(
        sum(float(part.double().sum()) for part in losses), device=head.device
    )
    if not (math.isfinite(total) and math.isfinite(float(norm))):
        raise NotFiniteError(_bad_samples(batches, losses))
    if in_backward is None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return StepFigures(
        loss=total / max(1, num_targets),
        grad_norm=float(norm),
        tokens=num_tokens,
        targets=num_targets,
    )


def _objective(
    carryon: CarryOn,
    batch: Batch,
    *,
    head: FrozenHead,
    chunk: int,
    kl_weight: float,
    base: BaseStates | None,
    pairs: PairProjections | None,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies [M], and the sum to minimize."""
    delta_MD = pair_delta(carryon, batch, head=head)
    states_MD = carryon.customize(batch.states, batch.positions, delta_MD, alpha=1.0)
    rows = sampled_head(head, batch.targets)
    losses = token_losses(states_MD, batch.targets, head=rows, chunk=chunk)
    if pairs is not None:
        assert base is not None
        assert isinstance(carryon, MixedCarryOn)
        losses = carryon.mix(losses, base.at_pairs(batch, head), pairs).losses
    if kl_weight == 0 or base is None:
        return losses, losses.sum()
    drift = base_divergences(states_MD, base.at_pairs(batch, head), head=head, chunk=chunk)
    return losses, losses.sum() + kl_weight * drift.sum()


def pair_losses(
    carryon: CarryOn, batch: Batch, *, head: FrozenHead, chunk: int, alpha: float
) -> Tensor:
    """Return the cross-entropy of the customized model at each supervised pair, [M] float32."""
    delta_MD = pair_delta(carryon, batch, head=head)
    return losses_of_delta(carryon, delta_MD, batch, head=head, chunk=chunk, alpha=alpha)


def pair_delta(carryon: CarryOn, batch: Batch, *, head: FrozenHead) -> Tensor:
    """Return the carry-on's correction at each supervised pair, before alpha, [M, D]."""
    with head.autocast():
        return carryon.correct_packed(batch.states, batch.packing(), batch.positions)


def losses_of_delta(
    carryon: CarryOn, delta_MD: Tensor, batch: Batch, *, head: FrozenHead, chunk: int, alpha: float
) -> Tensor:
    """Return the cross-entropy at each pair with its state corrected by alpha * delta, [M]."""
    states_MD = carryon.customize(batch.states, batch.positions, delta_MD, alpha=alpha)
    return token_losses(states_MD, batch.targets, head=head, chunk=chunk)


def _bad_samples(batches: Sequence[Batch], losses: Sequence[Tensor]) -> list[int]:
    """Return the samples of all processes whose loss is not finite; all samples if none is.

    Every process gets here together: a sum that is not finite is so in each of them.
    """
    bad = {
        int(batch.samples[row])
        for batch, part in zip(batches, losses, strict=True)
        for row in batch.rows_of_pairs()[~torch.isfinite(part).cpu().numpy()].tolist()
    }
    everything = {sample for batch in batches for sample in batch.samples.tolist()}
    return gather_lists(sorted(bad)) or gather_lists(sorted(everything))
