"""Exact against the plain float32 formula, in value and gradient.

Shapes: 11 positions in chunks of 4 (two full ones and a rest), width 16, vocabulary 50.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from carryon.cache.base.lm_head import FinalNorm, Head
from carryon.cache.format.quantization import bfloat16_bits
from carryon.train.losses import block_softmax, ways
from carryon.train.losses import cross_entropy as loss
from carryon.train.losses import frozen_head as frozen
from carryon.train.losses.cross_entropy import base_divergences, token_losses
from carryon.train.losses.frozen_head import FrozenHead, frozen_head

POSITIONS, WIDTH, VOCABULARY, CHUNK, BLOCK_ROWS = 11, 16, 50, 4, 20


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
            bias=bias if self.has_bias else None,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            dtype=dtype,
            device=torch.device("cpu"),
            block_rows=BLOCK_ROWS,
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
    return torch.nn.functional.cross_entropy(_logits(states, head), _targets(), reduction="none")


def _logits(states: Tensor, head: FrozenHead) -> Tensor:
    logits = states @ head.weight.float().t()
    if head.bias is not None:
        logits = logits + head.bias.float()
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits


def _log_probabilities(states: Tensor, head: FrozenHead) -> Tensor:
    return torch.log_softmax(_logits(states, head), dim=1)


def _value_and_gradient(losses: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.linspace(0.5, 2.0, POSITIONS)  # not every token counts the same
    (gradient,) = torch.autograd.grad((losses * weights).sum(), states)
    return losses.detach(), gradient


def _assert_equals_plain(case: Case) -> None:
    """Compare value and gradient with the plain formula."""
    head = case.head()
    states = _states().requires_grad_()

    losses, gradient = _value_and_gradient(
        token_losses(states, _targets(), head=head, chunk=CHUNK), states
    )
    plain_losses, plain_gradient = _value_and_gradient(_plain(states, head), states)

    torch.testing.assert_close(losses, plain_losses, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_value_and_gradient_equal_the_plain_formula(case: Case) -> None:
    _assert_equals_plain(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_without_gradients_the_losses_are_the_same_to_rounding(case: Case) -> None:
    head = case.head()
    with_gradient = token_losses(_states().requires_grad_(), _targets(), head=head, chunk=CHUNK)

    without = token_losses(_states(), _targets(), head=head, chunk=CHUNK)

    torch.testing.assert_close(without, with_gradient.detach(), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("has_kernel", [True, False])
def test_in_bfloat16_the_loss_is_that_of_float32_and_the_gradient_is_rounded(
    has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (block_softmax, loss, ways):
        monkeypatch.setattr(module, "has_kernel", lambda head: has_kernel)
    head = Case(id="bfloat16").head(torch.bfloat16)
    states = _states().bfloat16().float().requires_grad_()

    losses, gradient = _value_and_gradient(
        token_losses(states, _targets(), head=head, chunk=CHUNK), states
    )
    plain_losses, plain_gradient = _value_and_gradient(_plain(states, head), states)

    # Without the kernel a CPU rounds each logit (here up to 16) to bfloat16's 8 bits.
    torch.testing.assert_close(losses, plain_losses, rtol=2e-5, atol=1e-5 if has_kernel else 0.05)
    torch.testing.assert_close(gradient, plain_gradient, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_without_the_kernel_value_and_gradient_are_the_same(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_softmax, "has_kernel", lambda head: False)
    _assert_equals_plain(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_wide_head_needs_no_kernel_and_gives_the_same(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not case.head().is_wide
    monkeypatch.setattr(frozen, "WIDE", WIDTH)
    assert not block_softmax.has_kernel(case.head())
    assert not case.head(torch.bfloat16).is_wide
    _assert_equals_plain(case)


def test_a_very_unlikely_target_has_a_finite_exact_loss() -> None:
    head = FrozenHead(
        weight=torch.eye(4) * 200,
        bias=None,
        logit_scale=1.0,
        softcap=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        block_rows=2,
    )
    states = torch.tensor([[1.0, 0.0, 0.0, 0.0]])

    (loss,) = token_losses(states, torch.tensor([2]), head=head, chunk=CHUNK)

    assert float(loss) == 200.0  # its probability is far below the smallest float32


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
    assert (tensors.logit_scale, tensors.softcap) == (2.0, 9.0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_divergence_from_the_base_equals_the_plain_formula(case: Case) -> None:
    head = case.head()
    states = _states().requires_grad_()
    base = _states() + 0.1 * torch.randn(
        POSITIONS, WIDTH, generator=torch.Generator().manual_seed(4)
    )

    found, gradient = _value_and_gradient(
        base_divergences(states, base, head=head, chunk=CHUNK), states
    )
    expected = torch.nn.functional.kl_div(
        _log_probabilities(states, head),
        _log_probabilities(base, head),
        reduction="none",
        log_target=True,
    ).sum(dim=1)
    plain, plain_gradient = _value_and_gradient(expected, states)

    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, plain_gradient, rtol=1e-4, atol=1e-5)


def test_a_second_backward_pass_is_refused() -> None:
    states = _states().requires_grad_()
    total = token_losses(states, _targets(), head=Case(id="plain").head(), chunk=CHUNK).sum()
    torch.autograd.backward(total, retain_graph=True)

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(total)


def test_a_head_that_stays_in_the_host_gives_the_same_losses() -> None:
    resident, states = Case(id="all", has_bias=True).head(), _states()
    streamed = replace(resident, weight=resident.weight.bfloat16(), block_rows=7)
    rounded = replace(resident, weight=resident.weight.bfloat16().float(), block_rows=VOCABULARY)

    found = token_losses(states, _targets(), head=streamed, chunk=3)

    expected = token_losses(states, _targets(), head=rounded, chunk=POSITIONS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_rough_loss_in_bfloat16_is_that_of_float32_on_average(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "_LARGE", 0)
    random = torch.Generator().manual_seed(2)
    states = torch.randn(4000, WIDTH, generator=random).bfloat16()
    targets = torch.randint(0, VOCABULARY, (4000,), generator=random)
    head = replace(case.head(torch.bfloat16), is_rough=True)
    exact = replace(head, dtype=torch.float32)  # of the same weights
    with torch.no_grad():
        losses = token_losses(states, targets, head=head, chunk=CHUNK)
        expected = token_losses(states.float(), targets, head=exact, chunk=CHUNK)
        slow = token_losses(states, targets, head=replace(head, is_rough=False), chunk=CHUNK)
    difference = losses - expected
    assert abs(float(difference.mean())) < 1e-3
    assert float(difference.abs().max()) < 0.1
    if case.softcap is None:
        assert float((losses - slow).abs().max()) > 0
        assert float(difference.abs().max()) < 0.05
