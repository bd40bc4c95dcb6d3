"""The gate's shares, the mixture's log-probability, and their gradients."""

import math

import pytest
import torch
from torch import Tensor

from carryon.train.mixing.gate import (
    LEAST_SHARE,
    Gate,
    initial_shares,
    mixture_log_probs,
    target_shares,
)
from carryon.train.mixing.projection import FEATURES


def make_parts(*, num_sources: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 1 + num_sources, generator=random, dtype=torch.float64)
    logs = -3 * torch.rand(5, 1 + num_sources, generator=random, dtype=torch.float64)
    return logits.requires_grad_(), logs[:, 0].clone().requires_grad_(), logs[:, 1:].clone()


def test_the_mixture_is_the_sum_of_weighted_probabilities() -> None:
    logits, anchor, sources = make_parts()
    found = mixture_log_probs(logits, anchor, sources)

    weights = torch.softmax(logits, dim=1)
    probs = torch.cat([anchor.unsqueeze(1), sources], dim=1).exp()
    torch.testing.assert_close(found, (weights * probs).sum(dim=1).log())


def test_gradients_reach_the_gate_and_the_anchor_and_are_right() -> None:
    logits, anchor, sources = make_parts()

    assert torch.autograd.gradcheck(lambda a, b: mixture_log_probs(a, b, sources), (logits, anchor))


def test_no_gradient_reaches_the_cached_log_probabilities() -> None:
    logits, anchor, sources = make_parts()
    sources.requires_grad_()
    mixture_log_probs(logits, anchor, sources).sum().backward()

    assert sources.grad is None


def test_the_anchors_share_of_a_target_is_its_gradient() -> None:
    logits, anchor, sources = make_parts()
    mixture_log_probs(logits, anchor, sources).sum().backward()

    assert anchor.grad is not None
    torch.testing.assert_close(target_shares(logits, anchor, sources)[:, 0], anchor.grad)


def test_impossible_and_very_unlikely_targets_have_finite_gradients() -> None:
    logits = torch.tensor([[80.0, -80.0], [0.0, 0.0]], requires_grad=True)
    anchor = torch.tensor([-300.0, -0.5], requires_grad=True)
    found = mixture_log_probs(logits, anchor, torch.tensor([[-200.0], [-torch.inf]]))
    found.sum().backward()

    assert found.tolist() == pytest.approx([-300.0, -0.5 + math.log(0.5)])
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_an_untrained_gate_has_the_initial_shares_everywhere() -> None:
    shares = torch.tensor([0.7, 0.2, 0.1])
    gate = Gate(anchor_width=8, source_widths=[6], num_sources=2, shares=shares, seed=1)
    random = torch.Generator().manual_seed(2)
    logits = gate(
        torch.randn(4, 8, generator=random),
        torch.randn(4, 2, len(FEATURES), generator=random),
        [torch.randn(4, 6, generator=random)],
    )

    torch.testing.assert_close(torch.softmax(logits, dim=1), shares.expand(4, 3))


def test_a_gate_learns_from_states_and_features_alike() -> None:
    random = torch.Generator().manual_seed(2)
    states, features = (
        torch.randn(64, 8, generator=random),
        torch.randn(64, 1, len(FEATURES), generator=random),
    )
    is_better = (states[:, 0] + features[:, 0, 1]) > 0
    anchor = torch.where(is_better, -3.0, -0.1)
    sources = torch.where(is_better, -0.1, -3.0).unsqueeze(1)
    shares = initial_shares(torch.cat([anchor.unsqueeze(1), sources], dim=1))
    gate = Gate(anchor_width=8, source_widths=[], num_sources=1, shares=shares, seed=1)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = -mixture_log_probs(gate(states, features), anchor, sources).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.4 < losses[0]


def test_the_gate_is_small_at_the_width_of_a_small_base() -> None:
    gate = Gate(
        anchor_width=576, source_widths=[], num_sources=1, shares=torch.tensor([0.5, 0.5]), seed=1
    )

    assert sum(weight.numel() for weight in gate.parameters()) < 24_500


def test_equal_seeds_give_equal_gates() -> None:
    shares = torch.tensor([0.5, 0.5])
    one, two, three = (
        Gate(anchor_width=8, source_widths=[], num_sources=1, shares=shares, seed=seed)
        for seed in (1, 1, 2)
    )

    assert torch.equal(one.hidden.weight, two.hidden.weight)
    assert not torch.equal(one.hidden.weight, three.hidden.weight)


def test_constant_shares_are_the_likeliest_and_favour_the_stronger_source() -> None:
    random = torch.Generator().manual_seed(3)
    logs = -2 * torch.rand(400, 2, generator=random) - torch.tensor([0.2, 0.0])
    found = float(initial_shares(logs)[1])
    likelihoods = [
        float(torch.logsumexp(logs + torch.tensor([1 - g, g]).log(), dim=1).mean())
        for g in torch.linspace(0.02, 0.98, 97).tolist()
    ]
    best = float(torch.linspace(0.02, 0.98, 97)[int(torch.tensor(likelihoods).argmax())])

    assert found == pytest.approx(best, abs=0.06)
    assert found > 0.5


def test_a_source_that_is_never_better_keeps_the_least_share() -> None:
    logs = torch.tensor([[-1.0, -5.0]] * 50)

    assert initial_shares(logs).tolist() == pytest.approx(
        [1 / (1 + LEAST_SHARE), LEAST_SHARE / (1 + LEAST_SHARE)], rel=1e-4
    )
    assert initial_shares(torch.zeros(0, 3)).tolist() == pytest.approx([1 / 3] * 3)
