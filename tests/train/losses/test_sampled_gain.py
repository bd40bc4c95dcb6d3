"""Timing of the exact loss and the sampled softmax beside a run.

The clock goes on by the numbers of the products, not by seconds: on a busy machine too.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_train_stores import make_tiny_store
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

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
    return place_head(store, LossSettings(head_dtype="float32"), device=torch.device("cpu"))


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object
) -> int:
    return int(sdpa_flop_count(query, key, value))


@pytest.fixture
def _clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A second is a multiplication."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counted: dict[Any, Any] = {kernel: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        monkeypatch.setattr(sampled_gain, "perf_counter", lambda: counter.get_total_flops() / 2)
        yield


@pytest.mark.usefixtures("_clock")
def test_few_rows_are_faster_than_all_and_seconds_are_those_of_all_targets(
    store: Store, head: FrozenHead
) -> None:
    targets = torch.arange(512) % VOCABULARY
    all_of_them, few = (
        time_losses(head, store, targets, chunk=CHUNK, at_most_s=at_most_s)
        for at_most_s in (1e-6, 1.0)  # all targets are timed, and 32 of them
    )
    width = head.weight.shape[1]
    assert all_of_them.exact == 2 * 512 * VOCABULARY * width  # the loss, and its gradient
    assert few.exact == all_of_them.exact
    assert all_of_them.sampled < all_of_them.exact / 4


@pytest.mark.usefixtures("_clock")
def test_an_evaluation_of_a_target_has_no_gradient(head: FrozenHead) -> None:
    second = evaluation_seconds(head, torch.arange(512), chunk=CHUNK, at_most_s=1e-6)
    assert second == VOCABULARY * head.weight.shape[1]


def test_no_random_number_is_drawn_from_the_run(store: Store, head: FrozenHead) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    time_losses(head, store, torch.arange(64), chunk=CHUNK, at_most_s=1.0)
    assert torch.equal(torch.rand(4), expected)


def test_the_rows_of_a_step_are_at_most_the_vocabulary(tmp_path: Path) -> None:
    assert expected_rows(100) == 100
    assert expected_rows(10**6) == 4096 + sampled_gain.NUM_SAMPLED
