"""Speed of the frozen-head loss and gradient against its two matrix products alone.

Exact, and with a filter that omits negligible probabilities from the gradient.
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
from carryon.tools.bench.epoch import iter_batches
from carryon.tools.bench.job import Job, in_turn, timed
from carryon.train.config import LossSettings
from carryon.train.losses.calibration import calibrate
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
CALIBRATION_TARGET = 2.0  # seconds
CHOICE_TARGET = 1.05
_CALLS = 3  # of each way per round
_CHECKED = 64  # positions compared with the plain float32 formula
_ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
"""Of sums of products in each type, relative to a gradient's norm."""
_SPREAD = 5.0
"""Standard deviation of a synthetic state's logits. It gives about as many probabilities above
1e-3, 1e-4, 1e-5 and 1e-6 per position (25, 120, 450, 1,400) as SmolLM2-135M has on worked problems
(19, 72, 290, 1,000) and on Python's library (43, 250, 1,050, 3,300)."""
_LIKELY = 40.0  # lead of a synthetic state's own token, in nats before the sum over the rest


@dataclass(frozen=True, kw_only=True, slots=True)
class LossInput:
    """Input of a loss, synthetic or from a store."""

    head: FrozenHead
    states: Tensor
    """[M, D] float32."""
    targets: Tensor
    """[M] int64."""


def measure_loss(
    job: Job,
    *,
    tokens: int = 2048,
    width: int = 576,
    vocabulary: int = 49_152,
    gradient_filter: float = 1e-6,
    rounds: int = 5,
) -> None:
    """Report the speed and errors of the loss, exact and filtered, on synthetic states.

    With a store or a base also filtered on real states. Of a head that is large enough to choose a
    way by timing, also how long that takes, and how good the choice is.
    """
    synthetic = make_loss_input(positions=tokens, width=width, vocabulary=vocabulary)
    way = _measure_choice(job, synthetic, rounds=rounds)
    fastest = replace(synthetic, head=replace(synthetic.head, way=way))
    _measure(job, "loss.speed", fastest, target=LOSS_TARGET, rounds=rounds)
    inputs = {"loss.filtered.speed": synthetic}
    if job.given_stores or job.base:
        inputs["loss.filtered.store.speed"] = read_loss_input(job.open_store(), positions=tokens)
    for figure, exact in inputs.items():
        head = exact.head
        if head.device.type == "cpu":
            head = replace(head, weight=head.weight.float(), dtype=torch.float32)
        filtered = replace(exact, head=with_gradient_filter(head, gradient_filter))
        _measure(job, figure, filtered, target=FILTERED_TARGET, rounds=rounds)


def in_fastest_way(head: FrozenHead, *, positions: int) -> FrozenHead:
    """Return a head with the way of the loss that a run would choose."""
    measured = calibrate(head, positions=positions, chunk_tokens=DEFAULT_CHUNK)
    return head if measured is None else replace(head, way=measured.way)


def _measure_choice(job: Job, given: LossInput, *, rounds: int) -> str:
    """Report how the way of the loss is chosen, and return it."""
    start = time.perf_counter()
    measured = calibrate(given.head, positions=len(given.states), chunk_tokens=DEFAULT_CHUNK)
    elapsed_s = time.perf_counter() - start
    if measured is None:
        return given.head.way
    job.report(
        "loss.calibration",
        elapsed_s,
        "s",
        at_most=CALIBRATION_TARGET,
        way=measured.way,
        gradient_errors=measured.gradient_errors,
        loss_errors=measured.loss_errors,
    )
    ways = {
        name: timed(loss_way(replace(given, head=replace(given.head, way=name))), calls=_CALLS)
        for name in measured.seconds
    }
    seconds = in_turn(ways, rounds=rounds)
    job.report(
        "loss.choice",
        seconds[measured.way] / min(seconds.values()),
        "of the time of the fastest way",
        at_most=CHOICE_TARGET,
        way=measured.way,
        tokens_per_second={name: len(given.states) / each for name, each in seconds.items()},
    )
    return measured.way


def _measure(job: Job, figure: str, given: LossInput, *, target: float, rounds: int) -> None:
    ways = {f"limit.{name}": way for name, way in products_alone(given).items()}
    ways["loss"] = loss_way(given)
    seconds = in_turn({name: timed(way, calls=_CALLS) for name, way in ways.items()}, rounds=rounds)
    limit = min(value for name, value in seconds.items() if name.startswith("limit."))
    job.report(
        figure,
        limit / seconds["loss"],
        "of the products' speed",
        at_least=target,
        dtype=str(given.head.dtype),
        way=given.head.way,
        tokens_per_second={name: len(given.states) / each for name, each in seconds.items()},
        **errors_of(given),
    )


def make_loss_input(*, positions: int, width: int, vocabulary: int) -> LossInput:
    """Return a random head, and states that mostly make their target likely."""
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


def read_loss_input(store: Store, *, positions: int) -> LossInput:
    """Return a store's head and its states at the first supervised positions."""
    states: list[Tensor] = []
    targets: list[Tensor] = []
    for batch in iter_batches(store, taps=["final"]):
        states.append(batch.states["final"][batch.positions].float())
        targets.append(batch.targets)
        if sum(map(len, targets)) >= positions:
            break
    device = pick_device("auto")
    return LossInput(
        head=place_head(store, LossSettings(), device=device),
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
    """Return the errors of the loss and its gradient at a few positions."""
    count = min(_CHECKED, len(given.states))
    targets = given.targets[:count]
    states = given.states[:count].to(given.head.dtype).float().requires_grad_()
    logits = (states @ given.head.weight.float().t()) * given.head.logit_scale
    plain = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (plain_gradient,) = torch.autograd.grad(plain.sum(), states)
    losses = token_losses(states, targets, head=given.head, chunk=DEFAULT_CHUNK)
    (gradient,) = torch.autograd.grad(losses.sum(), states)
    errors = {
        "mean_loss": float(plain.detach().mean()),
        "loss_error": float((losses - plain).detach().abs().max()),
        "gradient_relative_error": float((gradient - plain_gradient).norm())
        / float(plain_gradient.norm()),
    }
    if given.head.gradient_filter == 0:
        return errors
    p = logits.detach().softmax(dim=1)
    left_out = torch.where(p < given.head.gradient_filter, p, 0.0).sum(dim=1)
    bounds = left_out * given.head.logit_scale * farthest_from_mean(given.head)
    bounds += _ROUNDING[given.head.dtype] * plain_gradient.norm(dim=1)
    return errors | {
        "gradient_filter": given.head.gradient_filter,
        "left_out_mean": float(left_out.mean()),
        "left_out_most": float(left_out.max()),
        "bound_relative": float(bounds.norm() / plain_gradient.norm()),
        "error_to_bound_most": float(((gradient - plain_gradient).norm(dim=1) / bounds).max()),
    }
