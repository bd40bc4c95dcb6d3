"""The frozen-head loss, value and gradient, against its two matrix products alone.

Letters: M positions, D width, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from carryon.tools.bench_figure import Figure, in_turn
from carryon.tools.bench_train import TrainJob
from carryon.train.device import (
    DEFAULT_CHUNK,
    pick_device,
    pick_head_dtype,
    reuse_freed_memory,
)
from carryon.train.frozen_head import CPU_BLOCK_ROWS, FrozenHead
from carryon.train.loss import token_losses

LOSS_TARGET = 0.75
_CALLS = 3  # in a round, of each way
_CHECKED = 64  # positions that are compared with the plain float32 formula
_LIKELY = 12.0  # lead of a made-up state's own token, in nats before the sum over the rest


@dataclass(frozen=True, kw_only=True, slots=True)
class MadeUpLoss:
    """Input of a loss like a half-trained model's: most targets are likely, some are not."""

    head: FrozenHead
    states: Tensor
    """[M, D] float32."""
    targets: Tensor
    """[M] int64."""


def measure_loss(job: TrainJob) -> None:
    """Report the speed of the loss, and its errors."""
    sizes = job.sizes
    given = make_up_loss(
        positions=sizes.loss_tokens, width=sizes.loss_width, vocabulary=sizes.loss_vocabulary
    )
    ways = {f"limit.{name}": way for name, way in products_alone(given).items()}
    ways["loss"] = loss_way(given)
    seconds = in_turn({name: timed(way) for name, way in ways.items()}, rounds=sizes.rounds)
    limit = min(value for name, value in seconds.items() if name.startswith("limit."))
    details = {"tokens_per_second": {k: sizes.loss_tokens / v for k, v in seconds.items()}}
    job.report(
        Figure(
            figure="loss.speed",
            value=limit / seconds["loss"],
            unit="of the products' speed",
            target=LOSS_TARGET,
            sense="at least",
            details={"dtype": str(given.head.dtype), **details, **errors_of(given)},
        )
    )


def make_up_loss(*, positions: int, width: int, vocabulary: int) -> MadeUpLoss:
    """Return a random head, and states that lean to a target which is likely for most."""
    random = torch.Generator().manual_seed(0)
    device = pick_device("auto")
    dtype = pick_head_dtype("auto", device)
    reuse_freed_memory()
    weight = torch.randn(vocabulary, width, generator=random) / width**0.5
    # Real text is uneven: a few tokens are most of it.
    targets = torch.rand(positions, generator=random).pow(4).mul(vocabulary).long()
    lead = _LIKELY * torch.rand(positions, 1, generator=random).sqrt()
    states = lead * weight[targets] + torch.randn(positions, width, generator=random)
    head = FrozenHead(
        weight=weight.to(device, dtype),
        bias=None,
        logit_scale=1.0,
        softcap=None,
        dtype=dtype,
        device=device,
        block_rows=CPU_BLOCK_ROWS if device.type == "cpu" else vocabulary,
    )
    return MadeUpLoss(head=head, states=states.to(device), targets=targets.to(device))


def products_alone(given: MadeUpLoss) -> dict[str, Callable[[], None]]:
    """Return the two matrix products in several layouts; the fastest is the limit."""
    weight, states = given.head.weight, given.states.to(given.head.dtype)
    layouts = {
        "whole": (len(states), len(weight)),
        "tokens": (256, len(weight)),
        "vocabulary": (len(states), 4096),
    }
    return {name: _products(weight, states, *sizes) for name, sizes in layouts.items()}


def _products(weight: Tensor, states: Tensor, rows: int, columns: int) -> Callable[[], None]:
    logits = states.new_empty(min(rows, len(states)), min(columns, len(weight)))
    gradient = states.new_empty(len(logits), states.shape[1])

    def multiply() -> None:
        for top in range(0, len(states), rows):
            for left in range(0, len(weight), columns):
                part, block = states[top : top + rows], weight[left : left + columns]
                product = logits[: len(part), : len(block)]
                if product.is_contiguous():
                    torch.mm(part, block.t(), out=product)
                else:
                    product = torch.mm(part, block.t())
                torch.mm(product, block, out=gradient[: len(part)])

    return multiply


def loss_way(given: MadeUpLoss) -> Callable[[], None]:
    """Return a call of the loss with its gradient."""

    def run() -> None:
        states = given.states.detach().requires_grad_()
        losses = token_losses(states, given.targets, head=given.head, chunk=DEFAULT_CHUNK)
        torch.autograd.backward(losses.sum())

    return run


def errors_of(given: MadeUpLoss) -> dict[str, float]:
    """Return the largest error of the loss and the error of the gradient on a few positions."""
    count = min(_CHECKED, len(given.states))
    targets = given.targets[:count]
    states = given.states[:count].to(given.head.dtype).float().requires_grad_()
    logits = states @ given.head.weight.float().t()
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (plain_gradient,) = torch.autograd.grad(plain.sum(), states)
    losses = token_losses(states, targets, head=given.head, chunk=DEFAULT_CHUNK)
    (gradient,) = torch.autograd.grad(losses.sum(), states)
    return {
        "mean_loss": float(plain.detach().mean()),
        "loss_error": float((losses - plain).detach().abs().max()),
        "gradient_relative_error": float((gradient - plain_gradient).norm())
        / float(plain_gradient.norm()),
    }


def timed(way: Callable[[], None]) -> Callable[[], float]:
    way()  # warm

    def seconds() -> float:
        _wait()
        started_at = time.perf_counter()
        for _ in range(_CALLS):
            way()
        _wait()
        return (time.perf_counter() - started_at) / _CALLS

    return seconds


def _wait() -> None:
    if torch.cuda.is_available():  # a waiting point: kernels run behind the calls
        torch.cuda.synchronize()
