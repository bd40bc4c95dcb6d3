"""Choose the way of the loss that is fastest on this machine, by timing each on the head.

The same code as in training multiplies some rows of the head with synthetic states. Each way is
first compared with the plain formula in float32. Letters: M positions, D base width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from carryon.cache.device import pick_chunk
from carryon.cache.timing import least_seconds
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import FrozenHead, HeadBlock
from carryon.train.losses.ways import ways_of

LOSS_TOLERANCE = 2e-3
"""Of the mean loss, in nats."""
GRADIENT_TOLERANCE = 5e-3
"""Of the gradient's norm. Rounding probabilities to bfloat16 alone takes 1.3e-3."""
SMALLEST_HEAD = 1 << 22
"""Numbers of a head from which ways are timed; a smaller one takes little of a step."""
CALL_FLOPS = 6e9
"""Of the products of one timed call: 40 to 150 ms."""
_MAX_POSITIONS = 1024
_CHECKED = 128  # positions compared with the plain formula
_MIN_ROWS = 1024
_EQUAL = 1.03
"""Of two ways whose times differ by less, the more exact is taken."""
_SPREAD = 4.0  # standard deviation of a synthetic state's logits
_LIKELY = 30.0  # maximum lead of a synthetic state's target, in nats before the sum over the rest


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What was measured of each way."""

    way: str
    """The way to take."""
    seconds: dict[str, float]
    """Least seconds of a call with `positions` targets, by way; only of ways exact enough."""
    loss_errors: dict[str, float]
    """Error of the mean loss, in nats, by way."""
    gradient_errors: dict[str, float]
    """Relative error of the gradient, by way."""

    def __str__(self) -> str:
        """Describe it in one line."""
        least = min(self.seconds.values())
        times = [f"{name} {each / least:.2f}" for name, each in self.seconds.items()]
        left_out = [
            f"{name} ({self._errors(name)})"
            for name in self.gradient_errors
            if name not in self.seconds
        ]
        parts = [f"times {', '.join(times)}", f"off by {self._errors(self.way)}"]
        parts += [f"too inexact: {', '.join(left_out)}"] if left_out else []
        return f"loss_way {self.way}: {'; '.join(parts)}"

    def _errors(self, name: str) -> str:
        gradient, loss = self.gradient_errors[name], self.loss_errors[name]
        return f"{gradient:.2%} of the gradient and {loss:.1g} nats"


def calibrate(head: FrozenHead, *, positions: int, chunk_tokens: int) -> Calibration | None:
    """Time the ways of the loss with its gradient; None if it is small, sampled or has one way.

    Args:
        head: of the training steps; one with frequent rows is not timed.
        positions: supervised positions of a micro-batch.
        chunk_tokens: as in LossSettings.
    """
    if head.frequent is not None:  # few rows a step: no gain was measured, so as before
        return None
    names = ways_of(head)
    if len(names) == 1 or head.weight.numel() < SMALLEST_HEAD:
        return None
    count = timed_positions(head, positions=positions)
    some, states, targets = synthetic_input(head, positions=count)
    calls = {
        name: loss_call(replace(some, way=name), states, targets, chunk=pick_chunk(chunk_tokens))
        for name in names
    }
    errors = {name: _errors(replace(some, way=name), states, targets) for name in names}
    exact = [
        name
        for name in names
        if name == names[0]  # what runs did before there was a choice
        or (errors[name][0] <= LOSS_TOLERANCE and errors[name][1] <= GRADIENT_TOLERANCE)
    ]
    timed = {name: calls[name] for name in exact}
    seconds = least_seconds(timed, num_threads=torch.get_num_threads())
    return Calibration(
        way=choose(seconds),
        seconds=seconds,
        loss_errors={name: each[0] for name, each in errors.items()},
        gradient_errors={name: each[1] for name, each in errors.items()},
    )


def timed_positions(head: FrozenHead, *, positions: int) -> int:
    """Return how many of a micro-batch's positions are timed: fewer if the head is wide."""
    affordable = int(CALL_FLOPS / (4 * _MIN_ROWS * head.weight.shape[1]))
    return max(1, min(positions, affordable, _MAX_POSITIONS))


def choose(seconds: dict[str, float]) -> str:
    """Return the first way that takes no longer than the fastest, up to a few percent."""
    least = min(seconds.values())
    return next(name for name, each in seconds.items() if each <= _EQUAL * least)


def synthetic_input(head: FrozenHead, *, positions: int) -> tuple[FrozenHead, Tensor, Tensor]:
    """Return a head of some rows, states [M, D] float32 with a gradient, and targets [M].

    Logits spread as on text, and targets are of every probability.
    """
    width = head.weight.shape[1]
    rows = max(_MIN_ROWS, int(CALL_FLOPS / (4 * positions * width)))
    rows = min(rows, max(2, head.block_rows), head.vocab_size)  # two blocks are checked
    weight = head.weight[:rows].to(head.device, head.dtype)
    bias = None if head.bias is None else head.bias[:rows]
    random = torch.Generator().manual_seed(0)
    targets = torch.randint(rows, (positions,), generator=random)
    squares = weight.float().square().sum(dim=1).clamp_(min=1e-12)
    lead = _LIKELY * torch.rand(positions, 1, generator=random).sqrt()
    states = weight[targets].float() * (lead / squares[targets].unsqueeze(1))
    noise = torch.randn(positions, width, generator=random)
    states += noise * (_SPREAD / float(squares.mean().sqrt()))
    states = states.div_(head.logit_scale).to(head.dtype).float()
    block = HeadBlock(first=0, weight=weight, bias=bias)
    some = replace(head, parts=(block,), frequent=None)
    return some, states.requires_grad_(), targets


def loss_call(
    head: FrozenHead, states: Tensor, targets: Tensor, *, chunk: int
) -> Callable[[], None]:
    """Return a call of the loss with its gradient to `states`."""

    def call() -> None:
        losses = token_losses(states, targets, head=head, chunk=chunk)
        torch.autograd.grad(losses.sum(), states)

    return call


def _errors(head: FrozenHead, states: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return the error of the mean loss and the relative error of the gradient.

    The rows are cut into two blocks, so that results are joined.
    """
    count = min(_CHECKED, len(targets))
    some = states[:count].detach().requires_grad_()
    assert head.parts is not None
    [block] = head.parts
    head = replace(head, parts=_halves(block))
    logits = some @ block.weight.float().t()
    if block.bias is not None:
        logits = logits + block.bias
    plain = nn.functional.cross_entropy(logits * head.logit_scale, targets[:count])
    (right,) = torch.autograd.grad(plain, some)
    mean = token_losses(some, targets[:count], head=head, chunk=count).mean()
    (gradient,) = torch.autograd.grad(mean, some)
    error = float((mean - plain).detach().abs())
    return error, float((gradient - right).norm() / right.norm().clamp_(min=1e-30))


def _halves(block: HeadBlock) -> tuple[HeadBlock, HeadBlock]:
    half = len(block.weight) // 2
    first, second = (
        replace(
            block,
            first=rows.start or 0,
            weight=block.weight[rows],
            bias=None if block.bias is None else block.bias[rows],
        )
        for rows in (slice(half), slice(half, None))
    )
    return first, second
