"""The frozen-head loss, value and gradient, against its two matrix products alone.

Exact, and with a filter that leaves negligible probabilities out of the gradient.
Letters: M positions, D width, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from carryon.cache.device import (
    DEFAULT_CHUNK,
    pick_device,
    pick_head_dtype,
    reuse_freed_memory,
)
from carryon.cache.store.reader import Store
from carryon.tools.bench.train import TrainJob
from carryon.tools.compare.figure import Figure, in_turn
from carryon.train.config import LossSettings, OptimizationSettings, StreamSettings
from carryon.train.data.datasets import open_data
from carryon.train.data.loader import Stream
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import (
    CPU_BLOCK_ROWS,
    FrozenHead,
    place_head,
    with_gradient_filter,
)
from carryon.train.losses.gradient_filter import farthest_from_mean

LOSS_TARGET = 0.75
FILTERED_TARGET = 1.0
_CALLS = 3  # in a round, of each way
_CHECKED = 64  # positions that are compared with the plain float32 formula
_ROUNDING = 1e-6  # of float32 sums, of a gradient's norm
_SPREAD = 5.0
"""Standard deviation of a made-up state's logits. So as many probabilities of a position are above
1e-3, 1e-4, 1e-5 and 1e-6 (some 25, 120, 450, 1,400) as in states of SmolLM2-135M on worked problems
(19, 72, 290, 1,000) and on Python's library (43, 250, 1,050, 3,300)."""
_LIKELY = 40.0  # lead of a made-up state's own token, in nats before the sum over the rest


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInput:
    """Input of a loss, made up like a half-trained model's or taken from a store."""

    head: FrozenHead
    states: Tensor
    """[M, D] float32."""
    targets: Tensor
    """[M] int64."""


def measure_loss(job: TrainJob) -> None:
    """Report the speed of the loss and its errors: exact, and with a gradient filter."""
    sizes = job.sizes
    given = make_up_loss(
        positions=sizes.loss_tokens, width=sizes.loss_width, vocabulary=sizes.loss_vocabulary
    )
    _measure(job, "loss.speed", given, target=LOSS_TARGET)
    places = {"loss.filtered.speed": given}
    if job.settings.store:
        places["loss.filtered.store.speed"] = take_loss(
            job.settings.store, positions=sizes.loss_tokens
        )
    for figure, exact in places.items():
        head = exact.head
        if head.device.type == "cpu":
            head = replace(head, weight=head.weight.float(), dtype=torch.float32)
        filtered = replace(exact, head=with_gradient_filter(head, sizes.loss_filter))
        _measure(job, figure, filtered, target=FILTERED_TARGET)


def _measure(job: TrainJob, figure: str, given: LossInput, *, target: float) -> None:
    ways = {f"limit.{name}": way for name, way in products_alone(given).items()}
    ways["loss"] = loss_way(given)
    seconds = in_turn({name: timed(way) for name, way in ways.items()}, rounds=job.sizes.rounds)
    limit = min(value for name, value in seconds.items() if name.startswith("limit."))
    details = {"tokens_per_second": {k: len(given.states) / v for k, v in seconds.items()}}
    job.report(
        Figure(
            figure=figure,
            value=limit / seconds["loss"],
            unit="of the products' speed",
            target=target,
            sense="at least",
            details={"dtype": str(given.head.dtype), **details, **errors_of(given)},
        )
    )


def make_up_loss(*, positions: int, width: int, vocabulary: int) -> LossInput:
    """Return a random head, and states that lean to a target which is likely for most."""
    random = torch.Generator().manual_seed(0)
    device = pick_device("auto")
    dtype = pick_head_dtype("auto", device)
    reuse_freed_memory()
    weight = torch.randn(vocabulary, width, generator=random) / width**0.5
    # Real text is uneven: a few tokens are most of it.
    targets = torch.rand(positions, generator=random).pow(4).mul(vocabulary).long()
    lead = _LIKELY * torch.rand(positions, 1, generator=random).sqrt()
    states = lead * weight[targets] + _SPREAD * torch.randn(positions, width, generator=random)
    head = FrozenHead(
        weight=weight.to(device, dtype),
        bias=None,
        logit_scale=1.0,
        softcap=None,
        dtype=dtype,
        device=device,
        block_rows=CPU_BLOCK_ROWS if device.type == "cpu" else vocabulary,
    )
    return LossInput(head=head, states=states.to(device), targets=targets.to(device))


def take_loss(path: str, *, positions: int) -> LossInput:
    """Return a store's head, and the base's own states at its first supervised positions."""
    data = open_data([path], StreamSettings(), taps=["final"])
    [windows] = data.plan(OptimizationSettings(epochs=1))
    states: list[Tensor] = []
    targets: list[Tensor] = []
    with Stream(
        data.store, windows, taps=["final"], settings=data.settings, is_pinned=False
    ) as steps:
        for batch in (batch for batches in steps for batch in batches):
            states.append(batch.states["final"][batch.positions].float())
            targets.append(batch.targets)
            if sum(map(len, targets)) >= positions:
                break
    device = pick_device("auto")
    return LossInput(
        head=place_head(Store.open(path), LossSettings(), device=device),
        states=torch.cat(states)[:positions].to(device),
        targets=torch.cat(targets)[:positions].to(device),
    )


def products_alone(given: LossInput) -> dict[str, Callable[[], None]]:
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


def loss_way(given: LossInput) -> Callable[[], None]:
    """Return a call of the loss with its gradient."""

    def run() -> None:
        states = given.states.detach().requires_grad_()
        losses = token_losses(states, given.targets, head=given.head, chunk=DEFAULT_CHUNK)
        torch.autograd.backward(losses.sum())

    return run


def errors_of(given: LossInput) -> dict[str, float]:
    """Return the largest error of the loss and the error of the gradient on a few positions."""
    count = min(_CHECKED, len(given.states))
    targets = given.targets[:count]
    states = given.states[:count].to(given.head.dtype).float().requires_grad_()
    logits = (states @ given.head.weight.float().t()) * given.head.logit_scale
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (plain_gradient,) = torch.autograd.grad(plain.sum(), states)
    losses = token_losses(states, targets, head=given.head, chunk=DEFAULT_CHUNK)
    (gradient,) = torch.autograd.grad(losses.sum(), states)
    found = {
        "mean_loss": float(plain.detach().mean()),
        "loss_error": float((losses - plain).detach().abs().max()),
        "gradient_relative_error": float((gradient - plain_gradient).norm())
        / float(plain_gradient.norm()),
    }
    if given.head.gradient_filter == 0:
        return found
    p = logits.detach().softmax(dim=1)
    left_out = torch.where(p < given.head.gradient_filter, p, 0.0).sum(dim=1)
    bounds = left_out * given.head.logit_scale * farthest_from_mean(given.head)
    bounds += _ROUNDING * plain_gradient.norm(dim=1)
    return found | {
        "gradient_filter": given.head.gradient_filter,
        "left_out_mean": float(left_out.mean()),
        "left_out_most": float(left_out.max()),
        "bound_relative": float(bounds.norm() / plain_gradient.norm()),
        "error_to_bound_most": float(((gradient - plain_gradient).norm(dim=1) / bounds).max()),
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
