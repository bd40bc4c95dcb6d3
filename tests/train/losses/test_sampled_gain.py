"""Timing of the exact loss and the sampled softmax beside a run."""

from pathlib import Path

import pytest
import torch
from support.tiny_train_stores import make_tiny_store

from carryon.cache.store.reader import Store
from carryon.train.config import LossSettings
from carryon.train.losses import sampled_gain
from carryon.train.losses.frozen_head import FrozenHead, place_head
from carryon.train.losses.sampled_gain import evaluation_seconds, expected_rows, time_losses

VOCABULARY, CHUNK = 30_000, 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of few tokens of a large vocabulary."""
    root = tmp_path_factory.mktemp("gain") / "store"
    return Store.open(make_tiny_store(root, vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def head(store: Store) -> FrozenHead:
    """Its head."""
    return place_head(store, LossSettings(), device=torch.device("cpu"))


def test_few_rows_are_faster_than_all_and_seconds_are_those_of_all_targets(
    store: Store, head: FrozenHead
) -> None:
    targets = torch.arange(512) % VOCABULARY
    some, rare = (
        time_losses(head, store, targets, chunk=CHUNK, at_most_s=at_most_s)
        for at_most_s in (1e-6, 1.0)  # all targets are timed, and 32 of them
    )
    assert 0 < some.sampled < some.exact
    assert rare.exact > some.exact / 4  # scaled to all: not a sixteenth of it


def test_an_evaluation_of_a_target_has_no_gradient(store: Store, head: FrozenHead) -> None:
    targets = torch.arange(512)
    second = evaluation_seconds(head, targets, chunk=CHUNK, at_most_s=1e-6)
    timed = time_losses(head, store, targets, chunk=CHUNK, at_most_s=1e-6)
    assert 0 < second * 512 < 1.5 * timed.exact


def test_no_random_number_is_drawn_from_the_run(store: Store, head: FrozenHead) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    time_losses(head, store, torch.arange(64), chunk=CHUNK, at_most_s=1.0)
    assert torch.equal(torch.rand(4), expected)


def test_the_rows_of_a_step_are_at_most_the_vocabulary(tmp_path: Path) -> None:
    assert expected_rows(100) == 100
    assert expected_rows(10**6) == 4096 + sampled_gain.NUM_SAMPLED
