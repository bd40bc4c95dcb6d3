"""One training step: gradients of a few batches, then one update by the optimizer.

Letters: M supervised pairs of a batch, D base width.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from carryon.train.data.batch import Batch
from carryon.train.kinds import BUILT_IN
from carryon.train.losses.base_states import BaseStates
from carryon.train.losses.cross_entropy import base_divergences, token_losses
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.sampled_softmax import sampled_head
from carryon.train.mixing.mixture import MixedCarryOn
from carryon.train.mixing.projected import PairProjections, ProjectedSources
from carryon.train.modules.carryon import CarryOn
from carryon.train.optim.optimizer import LR_FACTOR, CompositeOptimizer, skip_if_
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
    """Loss or gradient of a step is not finite."""

    def __init__(self, samples: list[int]) -> None:
        """Keep the indices of the samples to name."""
        super().__init__(f"not finite in samples {samples}")
        self.samples = samples


@dataclass(slots=True)
class Step:
    """A step that was taken; on an accelerator its figures may not have been read."""

    batches: tuple[Batch, ...]
    """On the host, without states."""
    losses: tuple[Tensor, ...]
    """[M] of each batch."""
    values: Tensor
    """[1 + batches] float64: norm of the gradient, and sum of the losses of each batch."""
    tokens: int
    """Of all processes."""
    targets: int
    """Of all processes."""
    figures: StepFigures | None = None
    """None: not read yet."""

    def read(self) -> StepFigures:
        """Return the figures; waits for the step to end.

        Raises:
            NotFiniteError: the loss or the gradient is not finite.
        """
        read_steps([self])
        assert self.figures is not None
        return self.figures


def read_steps(steps: Sequence[Step]) -> None:
    """Read the figures of steps, all in one copy from the device.

    Raises:
        NotFiniteError: as `Step.read`, of the first such step; those before it are read.
    """
    unread = [step for step in steps if step.figures is None]
    if not unread:
        return
    device = unread[0].values.device
    values = iter(torch.cat([step.values for step in unread]).cpu().tolist())
    norms, sums = [], []
    for step in unread:
        norms.append(next(values))
        sums.append(sum(next(values) for _ in step.losses))
    totals = sum_over_processes(*sums, device=device)
    for step, norm, total in zip(unread, norms, totals, strict=True):
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NotFiniteError(_bad_samples(step.batches, step.losses))
        step.figures = StepFigures(
            loss=total / max(1, step.targets),
            grad_norm=norm,
            tokens=step.tokens,
            targets=step.targets,
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
    kl_weight: float = 0.0,
    base: BaseStates | None = None,
    projected: ProjectedSources | None = None,
    correct: Callable[[Batch], Tensor] | None = None,
    is_read: bool = True,
) -> Step:
    """Update the weights of `carryon` by the gradient of the batches' mean loss.

    `base` is needed with a `kl_weight` and in a mixture, `projected` in a mixture. `correct` takes
    the place of `pair_delta`. Without `is_read` the host does not wait for the figures, which only
    `Step.read` checks.

    Raises:
        NotFiniteError: the loss or a gradient is not finite. No weight is updated, except by an
            optimizer that steps in the backward pass, where some gradients may be finite; and,
            without `is_read`, by any but a fused AdamW.
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
            correct=correct,
        )
        losses.append(batch_losses.detach())
        mean = objective / max(1, num_targets)
        if in_backward is not None and number == len(batches) - 1:
            if is_read and not bool(torch.isfinite(objective.detach())):
                raise NotFiniteError(_bad_samples(batches, losses))
            squares = in_backward.backward_and_move(mean, max_norm=limit)
        else:
            torch.autograd.backward(mean)
        del batch_losses, objective, mean  # and the gradient that they hold
    if in_backward is None:
        sum_gradients_(carryon.parameters())
        norm = torch.nn.utils.clip_grad_norm_(carryon.parameters(), limit)
    else:
        norm = torch.stack(squares).sum().sqrt() if squares else _zero(head.device)
    step = Step(
        batches=tuple(replace(batch.host, states={}) for batch in batches),
        losses=tuple(losses),
        values=torch.stack(
            [norm.double().to(head.device), *(part.double().sum() for part in losses)]
        ),
        tokens=num_tokens,
        targets=num_targets,
    )
    if is_read:
        step.read()
    if in_backward is None:
        if not is_read:
            skip_if_(optimizer, ~torch.isfinite(step.values).all())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), device=device)


def _objective(
    carryon: CarryOn,
    batch: Batch,
    *,
    head: FrozenHead,
    chunk: int,
    kl_weight: float,
    base: BaseStates | None,
    pairs: PairProjections | None,
    correct: Callable[[Batch], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies [M], and the sum to minimize."""
    delta_MD = correct(batch) if correct else pair_delta(carryon, batch, head=head)
    states_MD = carryon.customize(batch.states, batch.positions, delta_MD, alpha=1.0)
    rows = sampled_head(head, batch.host.targets)
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
    with products_of(carryon, head):
        return carryon.correct_packed(batch.states, batch.packing(), batch.positions)


def products_of(carryon: CarryOn, head: FrozenHead) -> AbstractContextManager[object]:
    """Return the context of a carry-on's products: in the head's dtype, mostly.

    A module of the user's need not cast its states to the dtype of its weights. So with weights in
    bfloat16 its products are in that, also below a head in float32.
    """
    is_users = carryon.settings.kind == "custom" or carryon.settings.kind not in BUILT_IN
    if is_users and any(weight.dtype == torch.bfloat16 for weight in carryon.parameters()):
        return torch.autocast(head.device.type, torch.bfloat16)
    return head.autocast()


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
