"""The order of an epoch is a pure function."""

import hashlib
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from carryon.train.data.sampler import (
    Window,
    count_steps,
    iter_epoch,
    plan_epoch,
    plan_pass,
    rank_rows,
    take_steps,
)

# 600 samples of 100 to 440 tokens in 12 units: three windows of four units.
NUM_SAMPLES = 600
LENGTHS = np.random.default_rng(1).integers(100, 441, NUM_SAMPLES).astype(np.int32)
UNITS = (np.arange(NUM_SAMPLES) // 50).astype(np.int64)
TRAIN = np.arange(20, NUM_SAMPLES, dtype=np.int64)


def _plan(
    *, seed: int = 0, epoch: int = 0, tokens_per_step: int = 2048, micro_batch_tokens: int = 0
) -> list[Window]:
    return plan_epoch(
        TRAIN,
        lengths=LENGTHS,
        units=UNITS,
        seed=(seed, 7),
        epoch=epoch,
        tokens_per_step=tokens_per_step,
        micro_batch_tokens=micro_batch_tokens,
        window_units=4,
    )


def _flat(windows: list[Window]) -> NDArray[np.int64]:
    batches = [batch for window in windows for step in window.steps for batch in step]
    return np.concatenate(batches)


def test_each_sample_is_in_exactly_one_step() -> None:
    assert sorted(_flat(_plan()).tolist()) == TRAIN.tolist()


def test_the_same_seed_and_epoch_give_the_same_order() -> None:
    np.testing.assert_array_equal(_flat(_plan()), _flat(_plan()))


@pytest.mark.parametrize(
    ("num_kinds", "micro_batch_tokens", "digest"),
    [
        (1, 0, "a9b8cc9c86340a79"),
        (1, 512, "287393dd008b6bef"),
        (3, 0, "12530b7c0a30d383"),
        (3, 512, "e90174763921a3b1"),
    ],
)
def test_the_order_is_that_of_runs_that_are_to_be_resumed(
    num_kinds: int, micro_batch_tokens: int, digest: str
) -> None:
    """Digests of earlier commits, which planned all windows at once; numpy keeps no such promise
    between its versions."""
    options: dict[str, Any] = {
        "lengths": LENGTHS,
        "units": UNITS,
        "seed": (2, 7),
        "epoch": 1,
        "tokens_per_step": 2048,
        "micro_batch_tokens": micro_batch_tokens,
        "window_units": 4,
        "shuffle_seed": 3,
        "kinds": UNITS % num_kinds if num_kinds > 1 else None,
    }
    planned = [
        (window.units, [[batch.tolist() for batch in step] for step in window.steps])
        for window in iter_epoch(TRAIN, **options)
    ]
    assert hashlib.sha256("".join(map(repr, planned)).encode()).hexdigest()[:16] == digest


def test_epochs_and_seeds_differ_in_order_and_in_neighbours() -> None:
    first = {frozenset(step[0].tolist()) for window in _plan() for step in window.steps}
    for other in (_plan(epoch=1), _plan(seed=1)):
        batches = {frozenset(step[0].tolist()) for window in other for step in window.steps}
        assert not np.array_equal(_flat(other), _flat(_plan()))
        assert len(first & batches) < 0.1 * len(first)


def test_no_step_is_longer_than_its_budget() -> None:
    for window in _plan():
        for step in window.steps:
            assert sum(int(LENGTHS[batch].sum()) for batch in step) <= 2048


def test_neighbours_are_not_of_one_length() -> None:
    # Grouping by length groups by kind, which costs held-out loss.
    spreads = [np.ptp(LENGTHS[step[0]]) for window in _plan() for step in window.steps]

    assert np.median(spreads) > 0.5 * np.ptp(LENGTHS)


def test_no_step_is_a_stub() -> None:
    for window in _plan():
        tokens = [int(LENGTHS[step[0]].sum()) for step in window.steps]
        assert min(tokens) > 0.4 * max(tokens)


def test_steps_are_cut_by_the_smallest_budget_that_needs_no_more_of_them() -> None:
    def cut(samples: NDArray[np.int64], budget: int) -> list[list[int]]:
        steps: list[list[int]] = []
        for sample in samples.tolist():
            if not steps or LENGTHS[[*steps[-1], sample]].sum() > budget:
                steps.append([])
            steps[-1].append(sample)
        return steps

    for tokens_per_step in (300, 700, 2048):
        for window in _plan(tokens_per_step=tokens_per_step):
            samples, budget = _flat([window]), tokens_per_step
            while budget > 1 and len(cut(samples, budget - 1)) == len(window.steps):
                budget -= 1
            assert [batch.tolist() for (batch,) in window.steps] == cut(samples, budget)


def test_only_a_sample_longer_than_the_budget_makes_a_larger_step() -> None:
    budget = int(np.median(LENGTHS))

    steps = [batch for window in _plan(tokens_per_step=budget) for (batch,) in window.steps]

    assert all(LENGTHS[batch].sum() <= budget or len(batch) == 1 for batch in steps)
    assert any(LENGTHS[batch].sum() > budget for batch in steps)


def test_a_window_needs_only_its_own_units() -> None:
    windows = _plan()

    assert [len(window.units) for window in windows] == [4, 4, 4]
    assert sorted(unit for window in windows for unit in window.units) == list(range(12))
    for window in windows:
        assert set(UNITS[_flat([window])].tolist()) == set(window.units)


def test_a_step_can_be_cut_into_smaller_batches() -> None:
    windows = _plan(micro_batch_tokens=512)

    assert sorted(_flat(windows).tolist()) == TRAIN.tolist()
    assert max(len(step) for window in windows for step in window.steps) >= 3
    for window in windows:
        for step in window.steps:
            assert all(int(LENGTHS[batch].sum()) <= 512 for batch in step)


def test_a_sample_longer_than_the_budget_still_makes_a_step() -> None:
    lengths = np.array([5000, 10, 10], dtype=np.int32)

    windows = plan_epoch(
        np.arange(3),
        lengths=lengths,
        units=np.zeros(3, dtype=np.int64),
        seed=(0,),
        epoch=0,
        tokens_per_step=32,
        micro_batch_tokens=0,
        window_units=1,
    )

    assert sorted(_flat(windows).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("step", [0, 1, 15, 40, 76])
def test_seeking_leaves_exactly_the_steps_that_follow(step: int) -> None:
    windows = _plan()
    steps = [each for window in windows for each in window.steps]

    left = [each for window in take_steps(windows, first=step) for each in window.steps]

    assert len(left) == len(steps) - step
    for actual, expected in zip(left, steps[step:], strict=True):
        np.testing.assert_array_equal(actual[0], expected[0])


def test_seeking_to_the_end_leaves_nothing_to_read() -> None:
    assert take_steps(_plan(), first=count_steps(_plan())) == []


def test_an_evaluation_passes_each_sample_once_in_store_order_of_units() -> None:
    windows = plan_pass(TRAIN, lengths=LENGTHS, units=UNITS, tokens_per_step=2048)

    assert sorted(_flat(windows).tolist()) == TRAIN.tolist()
    assert [window.units for window in windows] == [(unit,) for unit in range(12)]


def test_processes_share_a_batch_without_overlap() -> None:
    batch = np.arange(10)

    parts = [rank_rows(batch, rank=rank, world_size=3) for rank in range(3)]

    assert sorted(np.concatenate(parts).tolist()) == batch.tolist()
    assert [len(part) for part in parts] == [4, 3, 3]
