"""Every way of the loss against the plain formula in float32, in value and gradient."""

from dataclasses import replace

import pytest
import torch
from support.tiny_heads import HEADS, VOCABULARY, WIDTH, make_head
from torch import Tensor, nn

from carryon.train.losses.calibration import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.ways import WAYS, way_of, ways_of

POSITIONS, CHUNK = 70, 32
EXACT = ("attention", "float32", "shifted", "rounded")
"""Ways that are exact enough in bfloat16 to be chosen."""


def _states() -> Tensor:
    random = torch.Generator().manual_seed(2)
    states = 2 * torch.randn(POSITIONS, WIDTH, generator=random)
    return states.bfloat16().float().requires_grad_()


def _targets() -> Tensor:
    return torch.randint(VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(3))


def _in_bfloat16(head: FrozenHead) -> FrozenHead:
    return replace(head, weight=head.weight.bfloat16(), dtype=torch.bfloat16)


def _errors(head: FrozenHead) -> tuple[float, float, float]:
    """Return the errors of the mean loss, of the largest loss, and of the gradient, relative."""
    states, targets = _states(), _targets()
    logits = states @ head.weight.float().t()
    if head.bias is not None:
        logits = logits + head.bias
    right = nn.functional.cross_entropy(logits * head.logit_scale, targets, reduction="none")
    (right_gradient,) = torch.autograd.grad(right.sum(), states)
    losses = token_losses(states, targets, head=head, chunk=CHUNK)
    (gradient,) = torch.autograd.grad(losses.sum(), states)
    errors = (losses - right).detach()
    relative = float((gradient - right_gradient).norm() / right_gradient.norm())
    return abs(float(errors.mean())), float(errors.abs().max()), relative


@pytest.mark.parametrize("arguments", [each for each in HEADS if "softcap" not in each])
@pytest.mark.parametrize("way", WAYS)
def test_in_float32_every_way_is_the_plain_formula(way: str, arguments: dict[str, float]) -> None:
    head = replace(make_head(**arguments), way=way)  # type: ignore[arg-type]

    mean, largest, gradient = _errors(head)

    assert mean < 2e-6
    assert largest < 1e-5
    assert gradient < 2e-6


@pytest.mark.parametrize("arguments", [each for each in HEADS if "softcap" not in each])
@pytest.mark.parametrize("way", EXACT)
def test_in_bfloat16_every_way_is_exact_to_the_tolerance(
    way: str, arguments: dict[str, float]
) -> None:
    head = replace(_in_bfloat16(make_head(**arguments)), way=way)  # type: ignore[arg-type]

    mean, largest, gradient = _errors(head)

    assert mean < LOSS_TOLERANCE
    assert largest < 0.02
    assert gradient < GRADIENT_TOLERANCE


def test_products_rounded_relative_to_the_log_sum_are_more_exact_than_plain_ones() -> None:
    head = _in_bfloat16(make_head(mean=2.0))  # logits share a large part

    *_, plain = _errors(replace(head, way="plain"))
    *_, shifted = _errors(replace(head, way="shifted"))

    assert plain > GRADIENT_TOLERANCE
    assert shifted < plain / 4


def test_very_unlikely_targets_have_finite_losses_in_every_way() -> None:
    eye = torch.eye(WIDTH) * 200
    for dtype in (torch.float32, torch.bfloat16):
        head = replace(make_head(), weight=eye.to(dtype), dtype=dtype, block_rows=3)
        states = torch.eye(WIDTH)[:1].requires_grad_()
        for way in WAYS:
            losses = token_losses(
                states, torch.tensor([2]), head=replace(head, way=way), chunk=CHUNK
            )
            (gradient,) = torch.autograd.grad(losses.sum(), states)
            assert losses.item() == 200.0
            assert gradient[0, 0] == 200.0
            assert gradient[0, 2] == -200.0


def test_a_capped_head_has_one_way() -> None:
    head = replace(make_head(softcap=6.0), way="shifted")
    assert ways_of(head) == ["attention"]
    assert way_of(head) == "attention"
    targets = _targets()
    losses = token_losses(_states(), targets, head=head, chunk=CHUNK)
    before = token_losses(_states(), targets, head=replace(head, way="attention"), chunk=CHUNK)
    assert torch.equal(losses, before)
