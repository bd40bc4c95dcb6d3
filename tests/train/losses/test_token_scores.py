"""Scores of tokens: their share of a store, and their mean probability under its base."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_bases import make_tiny_base
from support.tiny_heads import HEADS, VOCABULARY, WIDTH, make_head
from support.tiny_stores import write_corpus
from support.tiny_train_stores import make_tiny_store

from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings
from carryon.cache.store.reader import Store
from carryon.train.config import LossSettings
from carryon.train.losses.frozen_head import place_head
from carryon.train.losses.sampled_softmax import place_training_head
from carryon.train.losses.token_scores import count_tokens, mean_probabilities, score_tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", HEADS, ids=str)
def test_mean_probabilities_are_those_of_the_plain_formula(kind: dict[str, float]) -> None:
    head = make_head(**kind)  # type: ignore[arg-type]
    states = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(2))
    logits = states @ head.weight.t()
    logits = (logits if head.bias is None else logits + head.bias) * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)

    found = mean_probabilities(states, head)

    assert found.shape == (VOCABULARY,)
    np.testing.assert_allclose(found, torch.softmax(logits, dim=1).mean(dim=0), rtol=1e-4)


def test_what_is_counted_is_what_stands_in_the_store(tmp_path: Path) -> None:
    store = Store.open(make_tiny_store(tmp_path / "store", vocab_size=1000))
    tokens = [token for unit in store.iter_units(taps=[]) for token in unit.tokens.tolist()]

    found = count_tokens(store, vocab_size=1000)

    assert found.tolist() == [tokens.count(token) for token in range(1000)]


def test_scores_are_shares_plus_mean_probabilities_before_targets(tmp_path: Path) -> None:
    store = Store.open(make_tiny_store(tmp_path / "store", vocab_size=1000))
    head = place_head(store, LossSettings(), device=CPU)
    counts = count_tokens(store, vocab_size=1000)

    found = score_tokens(store, head)

    added = found - counts / counts.sum()
    assert added.min() > 0
    assert added.sum() == pytest.approx(1, abs=1e-5)
    assert np.array_equal(found, score_tokens(store, head))


def _extract(root: Path, tap: str) -> Store:
    """Return a store of one tap of a tiny base, the same for each tap."""
    extract(
        base=str(make_tiny_base(root / f"base-{tap}")),
        data=[write_corpus(root / f"{tap}.jsonl", num_samples=12)],
        out=root / tap,
        corpus=CorpusSettings(max_tokens=32),
        store=StoreSettings(taps=[tap], unit_tokens=64, dtype="float32"),
        forward=ForwardSettings(device="cpu", compute_dtype="float32", batch_tokens=256),
    )
    return Store.open(root / tap)


def test_states_before_the_norm_score_as_those_after_it(tmp_path: Path) -> None:
    final, before = _extract(tmp_path, "final"), _extract(tmp_path, "prenorm")
    head = place_head(final, LossSettings(), device=CPU)

    np.testing.assert_allclose(score_tokens(before, head), score_tokens(final, head), rtol=1e-3)


def test_a_store_of_layers_alone_is_scored_by_its_tokens(tmp_path: Path) -> None:
    store = _extract(tmp_path, "layer.1")
    head = place_head(store, LossSettings(), device=CPU)
    counts = count_tokens(store, vocab_size=head.vocab_size)

    assert np.array_equal(score_tokens(store, head), counts / counts.sum())


def test_a_step_multiplies_the_tokens_with_the_largest_scores(tmp_path: Path) -> None:
    store = Store.open(make_tiny_store(tmp_path / "store", vocab_size=1000))
    whole = place_head(store, LossSettings(), device=CPU)

    head = place_training_head(store, LossSettings(sampled_softmax=30), device=CPU)

    assert head.frequent is not None
    largest = np.sort(np.argsort(-score_tokens(store, whole), kind="stable")[:250])
    assert torch.nonzero(head.frequent.is_frequent)[:, 0].tolist() == largest.tolist()
    assert len(head.frequent.strata) == 3
