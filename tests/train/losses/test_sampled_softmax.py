"""The loss of chosen rows, right on average.

Shapes: 70 positions in chunks of 32, heads of tiny_heads.py, of whose 300 rows 60 are frequent;
targets are of the first 80.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_heads import HEADS, VOCABULARY, WIDTH, make_head
from support.tiny_runs import Killed, assert_same_bits, kill_at, train_tiny
from support.tiny_train_stores import make_tiny_store
from torch import Tensor

from carryon.train.losses import sampled_softmax
from carryon.train.losses.calibration import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.sampled_softmax import (
    sampled_head,
    with_sampled_softmax,
)
from carryon.train.losses.ways import WAYS

POSITIONS, FREQUENT, NUMBER, CHUNK = 70, 60, 24, 32
TARGETS = 80
ROUNDING = 3e-6


def _counts(number: int = FREQUENT) -> np.ndarray:
    return np.maximum(0, number - np.arange(VOCABULARY))


def _given() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    states = torch.randn(POSITIONS, WIDTH, generator=random)
    return states, torch.randint(TARGETS, (POSITIONS,), generator=random)


def _plain_logits(states: Tensor, head: FrozenHead) -> Tensor:
    logits = states @ head.weight.t()
    logits = (logits if head.bias is None else logits + head.bias) * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def _found_and_expected(whole: FrozenHead, *, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return losses and gradient of a step, and those of the plain formula over the same rows."""
    whole = replace(whole, weight=whole.weight.bfloat16().float())
    states, targets = _given()
    states = states.bfloat16().float()
    head = with_sampled_softmax(
        replace(whole, weight=whole.weight.to(dtype), dtype=dtype), _counts(), NUMBER
    )
    torch.manual_seed(3)
    rare = sorted(set(targets.tolist()) - set(range(FREQUENT)))
    others = torch.tensor([each for each in range(FREQUENT, VOCABULARY) if each not in rare])
    drawn = others[torch.randperm(len(others))[:NUMBER]]
    assert len(rare) > 5
    plain_states = states.clone().requires_grad_()
    logits = _plain_logits(plain_states, whole)
    weighed = logits[:, drawn] + math.log((VOCABULARY - FREQUENT - len(rare)) / len(drawn))
    always = [*range(FREQUENT), *rare]
    chosen = torch.cat([logits[:, always], weighed], dim=1)
    places = torch.tensor([always.index(target) for target in targets.tolist()])
    expected = torch.nn.functional.cross_entropy(chosen, places, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), plain_states)

    states.requires_grad_()
    torch.manual_seed(3)
    found = token_losses(states, targets, head=sampled_head(head, targets), chunk=CHUNK)
    (gradient,) = torch.autograd.grad(found.sum(), states)
    return found.detach(), gradient, expected.detach(), expected_gradient


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", HEADS, ids=str)
def test_loss_and_gradient_are_those_of_the_plain_formula_over_the_same_rows(
    kind: dict[str, float], way: str
) -> None:
    head = replace(make_head(**kind), way=way)  # type: ignore[arg-type]

    found, gradient, expected, expected_gradient = _found_and_expected(head, dtype=torch.float32)

    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)
    largest = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=ROUNDING * largest)


@pytest.mark.parametrize("way", ["attention", "float32", "shifted", "rounded"])
@pytest.mark.parametrize("kind", [each for each in HEADS if "softcap" not in each], ids=str)
def test_in_bfloat16_every_way_is_exact_to_the_tolerance(kind: dict[str, float], way: str) -> None:
    head = replace(make_head(**kind), way=way)  # type: ignore[arg-type]

    found, gradient, expected, expected_gradient = _found_and_expected(head, dtype=torch.bfloat16)

    assert abs(float((found - expected).mean())) < LOSS_TOLERANCE
    error = float((gradient - expected_gradient).norm() / expected_gradient.norm())
    assert error < GRADIENT_TOLERANCE


def test_the_sum_of_exponentials_is_right_on_average() -> None:
    whole = make_head()
    head = with_sampled_softmax(whole, _counts(), NUMBER)
    states, targets = _given()
    picked = _plain_logits(states, whole).gather(1, targets[:, None])[:, 0]
    exact = (token_losses(states, targets, head=whole, chunk=CHUNK) + picked).double().exp()
    torch.manual_seed(4)

    draws = [
        (token_losses(states, targets, head=sampled_head(head, targets), chunk=CHUNK) + picked)
        .double()
        .exp()
        / exact
        for _ in range(2000)
    ]

    ratios = torch.stack(draws)
    errors = ratios.std(dim=0) / math.sqrt(len(ratios))
    assert float(ratios.std(dim=0).min()) > 0.01  # it is an estimate
    assert float(((ratios.mean(dim=0) - 1).abs() / errors).max()) < 5


def test_what_is_evaluated_is_of_the_whole_vocabulary() -> None:
    whole = make_head()
    head = with_sampled_softmax(whole, _counts(), NUMBER)
    states, targets = _given()

    found = token_losses(states, targets, head=head, chunk=CHUNK)

    assert torch.equal(found, token_losses(states, targets, head=whole, chunk=CHUNK))


@pytest.mark.parametrize(
    ("frequent", "number"),
    [(FREQUENT, 0), (FREQUENT, VOCABULARY - FREQUENT), (0, NUMBER)],
    ids=["off", "as many as others", "no counts"],
)
def test_where_nothing_is_saved_the_head_stays_whole(frequent: int, number: int) -> None:
    whole = make_head()

    found = with_sampled_softmax(whole, _counts(frequent), number)

    assert found is whole
    assert sampled_head(found, torch.tensor([1])) is whole


def test_the_rows_multiplied_are_the_frequent_those_of_the_targets_and_the_drawn() -> None:
    head = with_sampled_softmax(make_head(), _counts(), NUMBER)
    targets = torch.tensor([3, FREQUENT + 5, FREQUENT + 5, FREQUENT + 9])
    others = torch.tensor([*range(FREQUENT, FREQUENT + 5), *range(FREQUENT + 6, FREQUENT + 9)])
    others = torch.cat([others, torch.arange(FREQUENT + 10, VOCABULARY)])
    torch.manual_seed(3)
    drawn = others[torch.randperm(len(others))[:NUMBER]]

    torch.manual_seed(3)
    blocks = list(sampled_head(head, targets).blocks())

    assert [block.first for block in blocks] == [0, FREQUENT, FREQUENT + 2]
    assert [block.log_weight for block in blocks[:2]] == [0.0, 0.0]
    assert blocks[2].log_weight == math.log((VOCABULARY - FREQUENT - 2) / NUMBER)
    ids = [torch.arange(FREQUENT), torch.tensor([FREQUENT + 5, FREQUENT + 9]), drawn]
    for block, some in zip(blocks, ids, strict=True):
        assert torch.equal(block.weight, head.rows(some))


def test_only_so_many_tokens_are_frequent_the_most_frequent_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampled_softmax, "MOST_FREQUENT", 10)
    counts = _counts()[::-1].copy()  # the last tokens are the most frequent

    head = with_sampled_softmax(make_head(), counts, NUMBER)

    assert head.frequent is not None
    assert int(head.frequent.is_frequent.sum()) == 10
    assert torch.nonzero(head.frequent.is_frequent)[:, 0].tolist() == list(
        range(VOCABULARY - 10, VOCABULARY)
    )
    [others] = head.frequent.strata
    assert sorted(others.tolist()) == list(range(VOCABULARY - 10))


def test_never_more_than_a_quarter_of_the_vocabulary_is_frequent() -> None:
    head = with_sampled_softmax(make_head(), _counts(VOCABULARY), NUMBER)

    assert head.frequent is not None
    assert torch.nonzero(head.frequent.is_frequent)[:, 0].tolist() == list(range(VOCABULARY // 4))


def test_others_are_cut_by_score_and_each_part_gives_as_many() -> None:
    scores = np.random.default_rng(0).permutation(np.linspace(0.1, 1, VOCABULARY))
    head = with_sampled_softmax(make_head(), scores, NUMBER)

    assert head.frequent is not None
    ids = [torch.nonzero(head.frequent.is_frequent)[:, 0], *head.frequent.strata]
    assert [len(each) for each in ids] == [75, 10, 43, 172]
    for better, worse in zip(ids[:-1], ids[1:], strict=True):
        assert scores[better].min() > scores[worse].max()
    blocks = list(sampled_head(head, ids[1][:1]).blocks())
    assert [len(block.weight) for block in blocks] == [75, 1, 8, 8, 8]
    weights = [math.exp(block.log_weight) for block in blocks]
    assert weights == pytest.approx([1, 1, 9 / 8, 43 / 8, 172 / 8])


def test_a_part_that_is_smaller_than_its_share_is_sampled_whole() -> None:
    scores = np.linspace(1, 0.1, VOCABULARY)
    head = with_sampled_softmax(make_head(), scores, 200)

    blocks = list(sampled_head(head, torch.tensor([0])).blocks())

    assert [len(block.weight) for block in blocks] == [75, 10, 43, 128, 19]
    assert [math.exp(block.log_weight) for block in blocks[:3]] == [1, 1, 1]


def test_many_rows_come_in_blocks() -> None:
    whole = replace(make_head(), block_rows=64)

    head = sampled_head(with_sampled_softmax(whole, _counts(70), 100), torch.tensor([1]))

    assert [block.first for block in head.blocks()] == [0, 64, 70, 134]
    assert sum(len(block.weight) for block in head.blocks()) == 170


def test_training_with_it_lowers_the_held_out_nll_and_repeats(tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store", vocab_size=1000)

    exact = train_tiny(store, tmp_path / "exact")
    report = train_tiny(store, tmp_path / "run", sampled_softmax=100)
    train_tiny(store, tmp_path / "again", sampled_softmax=100)

    assert report.carryon_nll < report.base_nll
    assert report.base_nll == exact.base_nll
    assert report.carryon_nll != exact.carryon_nll
    assert_same_bits(tmp_path / "again", tmp_path / "run")


def test_a_killed_run_draws_the_same_rows_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_tiny_store(tmp_path / "store", vocab_size=1000)
    train_tiny(store, tmp_path / "whole", sampled_softmax=100)
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        with pytest.raises(Killed):
            train_tiny(store, tmp_path / "killed", sampled_softmax=100)

    train_tiny(store, tmp_path / "killed", sampled_softmax=100)

    assert_same_bits(tmp_path / "killed", tmp_path / "whole")
