"""An exact loss, and a gradient within its stated bound.

Shapes: 70 positions in chunks of 32, heads of tiny_heads.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_heads import HEADS, VOCABULARY, WIDTH, make_head
from support.tiny_train_stores import make_tiny_store
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.cache.store.reader import Store
from carryon.train.config import LossSettings
from carryon.train.losses import gradient_filter
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import FrozenHead, place_head, with_gradient_filter
from carryon.train.losses.gradient_filter import farthest_from_mean

POSITIONS, CHUNK, LEAST = 70, 32, 1e-3
ROUNDING = 2e-6


def _head(**kind: Any) -> FrozenHead:  # noqa: ANN401
    return make_head(mean=1.0, **kind)  # a mean row far from 0


def _given() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    states = 2.0 * torch.randn(POSITIONS, WIDTH, generator=random)
    return states, torch.randint(VOCABULARY, (POSITIONS,), generator=random)


def _loss_and_gradient(head: FrozenHead) -> tuple[Tensor, Tensor]:
    states, targets = _given()
    states.requires_grad_()
    losses = token_losses(states, targets, head=head, chunk=CHUNK)
    (gradient,) = torch.autograd.grad(losses.sum(), states)
    return losses.detach(), gradient


def _probabilities(head: FrozenHead) -> Tensor:
    logits = _given()[0] @ head.weight.t()
    logits = (logits if head.bias is None else logits + head.bias) * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.softmax(dim=1)


@pytest.mark.parametrize("kind", HEADS, ids=str)
def test_the_loss_is_exact_and_the_gradient_within_the_bound(
    kind: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_filter, "_MOST_SPARSE", 1.0)  # always by the sparse sum
    exact = _head(**kind)
    filtered = with_gradient_filter(exact, LEAST)
    p = _probabilities(exact)
    left_out = torch.where(p < LEAST, p, 0.0).sum(dim=1)
    assert 0 < float(left_out.max()) < 0.3  # something, and not all, is left out

    losses, gradient = _loss_and_gradient(filtered)
    exact_losses, exact_gradient = _loss_and_gradient(exact)

    torch.testing.assert_close(losses, exact_losses, rtol=1e-6, atol=5e-6)
    errors = (gradient - exact_gradient).norm(dim=1)
    bound = exact.logit_scale * left_out * farthest_from_mean(filtered)
    assert bool((errors <= bound + ROUNDING * exact_gradient.norm(dim=1)).all())
    assert float(errors.max()) > 100 * ROUNDING  # or nothing would have been tested


def test_the_bound_is_within_reach() -> None:
    """One row far from the mean holds all that is left out: the error comes near the bound."""
    weight = torch.zeros(VOCABULARY, WIDTH)
    weight[0, 0], weight[1, 1] = 20.0, 20.0
    exact = replace(_head(), weight=weight)
    filtered = with_gradient_filter(exact, 1e-2)
    states = torch.zeros(1, WIDTH)
    states[0, 0], states[0, 1] = 1.0, 0.7  # p is 0.9975 of row 0 and 0.0025 of row 1

    def gradient(head: FrozenHead) -> Tensor:
        leaf = states.clone().requires_grad_()
        loss = token_losses(leaf, torch.tensor([0]), head=head, chunk=CHUNK).sum()
        return torch.autograd.grad(loss, leaf)[0]

    p = (states @ weight.t()).softmax(dim=1)
    bound = float(p[p < 1e-2].sum()) * farthest_from_mean(filtered)

    assert 0.9 * bound < float((gradient(filtered) - gradient(exact)).norm()) <= bound


def test_a_filter_that_leaves_nothing_out_gives_the_exact_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact = _head()
    filtered = with_gradient_filter(exact, 1e-30)
    for share in (0.0, 1.0):  # by the matrix product, and by the sparse sum
        monkeypatch.setattr(gradient_filter, "_MOST_SPARSE", share)

        for found, expected in zip(
            _loss_and_gradient(filtered), _loss_and_gradient(exact), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=5e-6)


def test_the_same_call_gives_the_same_bits() -> None:
    filtered = with_gradient_filter(_head(), LEAST)

    for found, again in zip(
        _loss_and_gradient(filtered), _loss_and_gradient(filtered), strict=True
    ):
        assert torch.equal(found, again)


def test_a_target_of_no_likelihood_and_huge_logits_stay_finite() -> None:
    head = with_gradient_filter(replace(_head(), weight=torch.eye(4) * 200, block_rows=2), LEAST)
    states = torch.tensor([[1.0, 0.0, 0.0, 0.0]], requires_grad=True)

    (loss,) = token_losses(states, torch.tensor([2]), head=head, chunk=CHUNK)
    (gradient,) = torch.autograd.grad(loss, states)

    assert float(loss.detach()) == 200.0
    torch.testing.assert_close(gradient, torch.tensor([[200.0, 0.0, -200.0, 0.0]]))


def test_without_gradients_nothing_is_filtered() -> None:
    states, targets = _given()
    exact = _head()

    found = token_losses(states, targets, head=with_gradient_filter(exact, LEAST), chunk=CHUNK)

    assert torch.equal(found, token_losses(states, targets, head=exact, chunk=CHUNK))


def test_rounded_logits_are_refused_for_they_would_round_the_loss(tmp_path: Path) -> None:
    store = Store.open(make_tiny_store(tmp_path / "store"))
    settings = LossSettings(head_dtype="bfloat16", gradient_filter=LEAST)

    with pytest.raises(InputError, match="gradient_filter: expected products in float32"):
        place_head(store, settings, device=torch.device("cpu"))
