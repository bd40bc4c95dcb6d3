"""Batches padded to a few sizes: the same steps, and sizes that hold nearly all batches."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.steps import read_batches, take
from support.tiny_train_stores import make_tiny_store
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.cache.store.reader import Store
from carryon.train.config import (
    CarryOnSettings,
    LossSettings,
    MemorySettings,
    OptimizationSettings,
)
from carryon.train.data import padding
from carryon.train.data.batch import Batch
from carryon.train.data.padding import (
    PaddedSize,
    choose_sizes,
    fitting_size,
    measure_padding,
    pad,
)
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.sampled_softmax import place_training_head
from carryon.train.modules.bottleneck import Bottleneck
from carryon.train.modules.carryon import CarryOn, build_carryon
from carryon.train.optim.optimizer import build_optimizer

CPU = torch.device("cpu")
TAPS = ["final", "layer.1"]
SHAPE = CarryOnSettings(width=8, heads=2, intermediate_size=8, blocks=2, taps=TAPS)
SIZE = PaddedSize(tokens=96, rows=16, longest=24, pairs=80)
"""Larger in each way than the batches, of at most 64 tokens in 5 to 12 a sample."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A tiny store of two taps."""
    return Store.open(make_tiny_store(tmp_path_factory.mktemp("padding") / "store", taps=TAPS))


def _carryon(store: Store) -> CarryOn:
    """Return a carry-on whose every weight has a gradient: its output is not zero."""
    carryon = build_carryon(SHAPE, store, seed=0)
    assert isinstance(carryon, Bottleneck)
    with torch.no_grad():
        carryon.up.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    return carryon


def _head(store: Store, dtype: str = "float32") -> FrozenHead:
    settings = LossSettings.from_dict({"head_dtype": dtype})
    return place_training_head(store, settings, device=CPU)


def _padded_delta(carryon: CarryOn, batch: Batch, size: PaddedSize, *, filled: bool) -> Tensor:
    """Return the correction of a padded batch; `filled` puts large numbers in place of zeros."""
    padded = pad(batch, size, taps=TAPS)
    if filled:
        for states in padded.states.values():
            states[batch.num_tokens :] = 1000.0
    found = carryon.correct_packed(padded.states, padded.packing, padded.positions)
    return found[: batch.num_targets]


def _gradients(carryon: CarryOn, delta: Tensor, batch: Batch, head: FrozenHead) -> list[Tensor]:
    states = carryon.customize(batch.states, batch.positions, delta, alpha=1.0)
    losses = token_losses(states, batch.targets, head=head, chunk=32)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), list(carryon.parameters()))]


def test_a_padded_step_has_the_loss_and_the_gradients_of_a_plain_one(store: Store) -> None:
    carryon, head = _carryon(store), _head(store)
    for batch in read_batches(store, TAPS, is_pinned=False):
        plain = carryon.correct_packed(batch.states, batch.packing(), batch.positions)
        padded = _padded_delta(carryon, batch, SIZE, filled=False)

        right = _gradients(carryon, plain, batch, head)
        found = _gradients(carryon, padded, batch, head)

        assert all(float(each.norm()) > 0 for each in right)
        for ours, theirs in zip(found, right, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_what_the_padding_holds_changes_no_bit(store: Store) -> None:
    carryon, head = _carryon(store), _head(store)
    batch = read_batches(store, TAPS, is_pinned=False)[0]
    found = [
        _gradients(carryon, _padded_delta(carryon, batch, SIZE, filled=filled), batch, head)
        for filled in (False, True)
    ]
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_a_batch_of_the_very_size_has_the_same_bits(store: Store) -> None:
    carryon, head = _carryon(store), _head(store)
    batch = read_batches(store, TAPS, is_pinned=False)[0]
    packing = batch.packing()
    size = PaddedSize(
        tokens=batch.num_tokens,
        rows=packing.num_rows,
        longest=packing.longest,
        pairs=batch.num_targets,
    )
    plain = carryon.correct_packed(batch.states, packing, batch.positions)
    padded = _padded_delta(carryon, batch, size, filled=False)

    ours, theirs = (_gradients(carryon, each, batch, head) for each in (padded, plain))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twenty_padded_steps_end_where_plain_ones_do(store: Store, dtype: str) -> None:
    batches = read_batches(store, TAPS, is_pinned=False)
    losses, head = [], _head(store, dtype)
    for is_padded in (False, True):
        carryon = _carryon(store)
        optimizer = build_optimizer(carryon, OptimizationSettings(), MemorySettings())

        def correct(batch: Batch, carryon: CarryOn = carryon) -> Tensor:
            with head.autocast():
                return _padded_delta(carryon, batch, SIZE, filled=False)

        more: dict[str, Any] = {"correct": correct} if is_padded else {}
        steps = [
            take(carryon, optimizer, [batches[step % len(batches)]], head=head, **more)
            for step in range(20)
        ]
        losses.append([step.read().loss for step in steps])

    assert losses[0][-1] < losses[0][0]
    tolerance = 1e-4 if dtype == "float32" else 0.02
    np.testing.assert_allclose(losses[1], losses[0], atol=tolerance)


def _lengths(*samples: int) -> NDArray[np.int64]:
    return np.array(samples, dtype=np.int64)


def test_a_size_holds_what_fits_with_its_padding() -> None:
    size = PaddedSize(tokens=32, rows=4, longest=16, pairs=20)
    assert size.holds(_lengths(16, 16), pairs=20)
    assert size.holds(_lengths(4, 4, 4, 16), pairs=0) is False  # 4 tokens are one row more
    assert size.holds(_lengths(4, 4, 16), pairs=0)  # 8 tokens are the fourth row
    assert not size.holds(_lengths(16, 16), pairs=21)
    assert not size.holds(_lengths(17), pairs=0)
    assert not size.holds(_lengths(16, 16, 1), pairs=0)


def test_the_size_with_the_least_work_is_taken() -> None:
    small, large = (PaddedSize(tokens=32, rows=8, longest=longest, pairs=32) for longest in (8, 16))
    assert fitting_size([large, small], _lengths(8, 8), pairs=3) == small
    assert fitting_size([large, small], _lengths(8, 9), pairs=3) == large
    assert fitting_size([large, small], _lengths(33), pairs=3) is None


def _batches(seed: int, *, longest: int, count: int = 400) -> list[NDArray[np.int64]]:
    """Return batches of up to 512 tokens, of samples that are mostly short."""
    random, batches = np.random.default_rng(seed), []
    while len(batches) < count:
        lengths = np.minimum(longest, 4 + random.geometric(0.02, size=200))
        stop = int(np.searchsorted(np.cumsum(lengths), 512, side="right"))
        batches.append(lengths[:stop].astype(np.int64))
    return batches


@pytest.mark.parametrize("longest", [10, 64, 500])
def test_a_few_sizes_hold_nearly_all_batches_of_a_run(longest: int) -> None:
    batches = _batches(0, longest=longest)
    sizes = choose_sizes([*batches, _lengths(4000)], most_tokens=512, density=0.4)

    assert 1 <= len(sizes) <= padding.MOST_SIZES
    assert all(PaddedSize.parse(str(size)) == size for size in sizes)
    assert all(size.pairs == 256 and size.tokens == 512 for size in sizes)
    measured = measure_padding(batches, sizes)
    assert measured.held > 0.9
    assert 1 <= measured.rows < 2.5


def test_sizes_of_few_samples() -> None:
    assert choose_sizes([], most_tokens=64, density=1.0) == ()
    assert choose_sizes([_lengths(65)], most_tokens=64, density=1.0) == ()
    [size] = choose_sizes([_lengths(1)], most_tokens=64, density=1.0)
    assert size == PaddedSize(tokens=8, rows=2, longest=8, pairs=8)
    assert size.holds(_lengths(1), pairs=1)


@pytest.mark.parametrize(
    "text",
    ["", "1024", "8x2x4", "8x1x4x4", "8x2x9x4", "8x2x4x9", "0x1x1x1", "8x2x4x-4", "8x2x4x1e3"]
    + ["99999999x1x99999999x1", "8x2x4x4x4", "\uff18x2x4x4"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="padded_sizes: expected sizes TOKENSxROWS"):
        PaddedSize.parse(text)


def test_a_batch_of_another_device_is_padded_there(store: Store) -> None:
    """On `meta`, which has no values: none is read on the way."""
    batch = read_batches(store, TAPS, is_pinned=False)[0]
    moved = replace(
        batch,
        states={tap: states.to("meta") for tap, states in batch.states.items()},
        positions=batch.positions.to("meta"),
    )
    padded = pad(moved, SIZE, taps=["final"])
    assert list(padded.states) == ["final"]
    assert padded.states["final"].shape == (SIZE.tokens, store.width)
    assert padded.states["final"].device == padded.positions.device == torch.device("meta")
    assert len(padded.positions) == SIZE.pairs
    assert (padded.packing.num_rows, padded.packing.longest) == (SIZE.rows, SIZE.longest)
