"""carryon.train.loss: exact against the plain float32 formula, in value and gradient.

Shapes: 11 positions in chunks of 4 (two full ones and a rest), width 16, vocabulary 50.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from carryon.cache.head import FinalNorm, Head
from carryon.cache.precision import bfloat16_bits
from carryon.train.loss import FrozenHead, frozen_head, token_losses

POSITIONS, WIDTH, VOCABULARY, CHUNK = 11, 16, 50, 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A head of one kind."""

    id: str
    has_bias: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None

    def head(self, dtype: torch.dtype = torch.float32) -> FrozenHead:
        random = torch.Generator().manual_seed(1)
        weight = torch.randn(VOCABULARY, WIDTH, generator=random)
        bias = torch.randn(VOCABULARY, generator=random)
        return FrozenHead(
            weight=weight.to(dtype),
            bias=bias.to(dtype) if self.has_bias else None,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
        )


CASES = [
    Case(id="plain"),
    Case(id="bias", has_bias=True),
    Case(id="scale", logit_scale=0.25),
    Case(id="softcap", softcap=5.0),
    Case(id="all", has_bias=True, logit_scale=0.5, softcap=3.0),
]


def _states() -> Tensor:
    random = torch.Generator().manual_seed(2)
    return torch.randn(POSITIONS, WIDTH, generator=random)


def _targets() -> Tensor:
    return torch.randint(VOCABULARY, (POSITIONS,), generator=torch.Generator().manual_seed(3))


def _plain(states: Tensor, head: FrozenHead) -> Tensor:
    logits = states @ head.weight.float().t()
    if head.bias is not None:
        logits = logits + head.bias.float()
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return torch.nn.functional.cross_entropy(logits, _targets(), reduction="none")


def _value_and_gradient(losses: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.linspace(0.5, 2.0, POSITIONS)  # not every token counts the same
    (gradient,) = torch.autograd.grad((losses * weights).sum(), states)
    return losses.detach(), gradient


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_value_and_gradient_equal_the_plain_formula(case: Case) -> None:
    head = case.head()
    states = _states().requires_grad_()

    losses, gradient = _value_and_gradient(
        token_losses(states, _targets(), head=head, chunk=CHUNK), states
    )
    plain_losses, plain_gradient = _value_and_gradient(_plain(states, head), states)

    torch.testing.assert_close(losses, plain_losses, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_without_gradients_the_losses_are_the_same_bits(case: Case) -> None:
    head = case.head()
    with_gradient = token_losses(_states().requires_grad_(), _targets(), head=head, chunk=CHUNK)

    without = token_losses(_states(), _targets(), head=head, chunk=CHUNK)

    assert torch.equal(without, with_gradient.detach())


def test_in_bfloat16_only_the_products_are_rounded() -> None:
    head = Case(id="bfloat16").head(torch.bfloat16)
    states = _states().bfloat16().float().requires_grad_()
    logits = (states.detach().bfloat16() @ head.weight.t()).float()
    rounded = torch.nn.functional.cross_entropy(logits, _targets(), reduction="none")

    losses, gradient = _value_and_gradient(
        token_losses(states, _targets(), head=head, chunk=CHUNK), states
    )

    # Float32-exact on the rounded logits; the gradient within bfloat16's 8 bits.
    torch.testing.assert_close(losses, rounded, rtol=1e-6, atol=2e-6)
    plain_gradient = _value_and_gradient(_plain(states, head), states)[1]
    torch.testing.assert_close(gradient, plain_gradient, rtol=0.05, atol=0.05)


def test_a_very_unlikely_target_has_a_finite_exact_loss() -> None:
    head = FrozenHead(weight=torch.eye(4) * 200, bias=None, logit_scale=1.0, softcap=None)
    states = torch.tensor([[1.0, 0.0, 0.0, 0.0]])

    (loss,) = token_losses(states, torch.tensor([2]), head=head, chunk=CHUNK)

    assert float(loss) == 200.0  # its probability is far below the smallest float32


def test_more_rows_than_a_softmax_block_give_the_same_losses() -> None:
    head = Case(id="plain").head()
    states, targets = _states().repeat(4, 1), _targets().repeat(4)  # 44 rows, blocks of 16

    losses = token_losses(states, targets, head=head, chunk=64)

    torch.testing.assert_close(losses, _plain(_states(), head).repeat(4), rtol=1e-6, atol=2e-6)


def test_no_positions_have_no_losses() -> None:
    states = torch.zeros(0, WIDTH, requires_grad=True)

    losses = token_losses(states, _targets()[:0], head=Case(id="plain").head(), chunk=CHUNK)
    torch.autograd.backward(losses.sum())

    assert losses.shape == (0,)
    assert states.grad is not None
    assert states.grad.shape == (0, WIDTH)


def test_the_states_gradient_comes_in_their_own_type() -> None:
    states = _states().bfloat16().requires_grad_()

    losses = token_losses(states, _targets(), head=Case(id="plain").head(), chunk=CHUNK)
    torch.autograd.backward(losses.sum())

    assert states.grad is not None
    assert states.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_of_a_store_becomes_tensors_of_the_asked_type(dtype: torch.dtype) -> None:
    weight = np.linspace(-1, 1, VOCABULARY * WIDTH, dtype=np.float32).reshape(VOCABULARY, WIDTH)
    norm = FinalNorm(
        kind="rms", eps=1e-6, weight_offset=0.0, weight=np.ones(WIDTH, np.float32), bias=None
    )
    head = Head(
        weight=bfloat16_bits(weight),
        bias=np.ones(VOCABULARY, np.float32),
        logit_scale=2.0,
        softcap=9.0,
        norm=norm,
    )

    tensors = frozen_head(head, device=torch.device("cpu"), dtype=dtype)

    assert torch.equal(tensors.weight, torch.from_numpy(weight).bfloat16().to(dtype))
    assert tensors.bias is not None
    assert tensors.bias.dtype == dtype
    assert (tensors.logit_scale, tensors.softcap) == (2.0, 9.0)
