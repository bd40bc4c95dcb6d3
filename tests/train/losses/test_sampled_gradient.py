"""The gradient of the sampled softmax, on average, over vocabulary sizes.

The gradient of the sum of exponentials is unbiased. That of its logarithm, which trains, is a ratio
of two estimates: its bias shrinks with the number of negatives.
Shapes: 20 positions, heads 16 wide; scores that fall with the token's number, so that negatives
come from all strata; targets from the whole vocabulary, so that most of them are rare.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.sampled_softmax import STRATA, sampled_head, with_sampled_softmax

POSITIONS, WIDTH, CHUNK = 20, 16, 64
SIZES = (600, 5_000, 50_000)
"""Of vocabularies, V."""
DRAWS = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Positions before a head."""

    head: FrozenHead
    states: Tensor
    targets: Tensor

    def losses_and_gradient(self, rows: FrozenHead) -> tuple[Tensor, Tensor]:
        """Return losses [M] and their gradient to the states [M, D], over some rows."""
        states = self.states.clone().requires_grad_()
        losses = token_losses(states, self.targets, head=rows, chunk=CHUNK)
        [gradient] = torch.autograd.grad(losses.sum(), states)
        return losses.detach().double(), gradient.double()

    def draws(self, num_sampled: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield losses and gradient of one draw of negatives after another."""
        scores = 1 / (1 + np.arange(self.head.vocab_size))
        head = with_sampled_softmax(self.head, scores, num_sampled)
        assert head.frequent is not None
        assert len(head.frequent.strata) == len(STRATA)
        torch.manual_seed(3)
        for _ in range(DRAWS):
            yield self.losses_and_gradient(sampled_head(head, self.targets))


def _case(vocab_size: int) -> Case:
    random = torch.Generator().manual_seed(vocab_size)
    head = FrozenHead(
        weight=torch.randn(vocab_size, WIDTH, generator=random),
        bias=None,
        logit_scale=1.0,
        softcap=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        block_rows=4096,
    )
    return Case(
        head=head,
        states=0.3 * torch.randn(POSITIONS, WIDTH, generator=random),
        targets=torch.randint(vocab_size, (POSITIONS,), generator=random),
    )


@pytest.mark.parametrize("vocab_size", SIZES)
def test_the_gradient_of_the_sum_of_exponentials_is_unbiased(vocab_size: int) -> None:
    case = _case(vocab_size)
    rows = case.head.weight[case.targets].double()
    picked = (case.states * case.head.weight[case.targets]).sum(dim=1).double()

    def of_the_sum(losses: Tensor, gradient: Tensor) -> Tensor:
        return (losses + picked).exp()[:, None] * (gradient + rows)

    exact = of_the_sum(*case.losses_and_gradient(case.head))

    drawn = torch.stack([of_the_sum(*each) for each in case.draws(100)])

    errors = drawn.std(dim=0) / math.sqrt(DRAWS)
    assert float((errors / exact.abs().mean()).max()) > 1e-3  # it is an estimate
    deviations = (drawn.mean(dim=0) - exact) / errors
    assert float(deviations.abs().max()) < 5.5
    assert float(deviations.square().mean()) < 1.6


@pytest.mark.parametrize("vocab_size", SIZES)
def test_the_bias_of_the_gradient_shrinks_with_the_number_of_negatives(vocab_size: int) -> None:
    case = _case(vocab_size)
    _, exact = case.losses_and_gradient(case.head)

    few, many = (_bias(case, exact, number) for number in (32, 128))

    assert many < 0.05
    assert many < 0.5 * few


def _bias(case: Case, exact: Tensor, num_sampled: int) -> float:
    """Return the norm of the mean error, relative to the gradient, without the noise of a mean."""
    errors = torch.stack([gradient - exact for _, gradient in case.draws(num_sampled)])
    noise = float(errors.var(dim=0).sum()) / DRAWS
    square = float(errors.mean(dim=0).square().sum()) - noise
    return math.sqrt(max(0.0, square)) / float(exact.norm())
