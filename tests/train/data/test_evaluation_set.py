"""Which held-out samples a run evaluates on its way."""

import numpy as np
import pytest

from carryon.train.data.evaluation_set import (
    EVALUATION_COST,
    MAX_RATIO,
    MAX_TOKENS,
    MIN_SAMPLES,
    MIN_TARGETS,
    Work,
    choose_evaluated,
    count_evaluations,
    evaluation_ratio,
    first_samples,
)
from carryon.train.data.sampler import Window

LENGTHS = np.random.default_rng(0).integers(50, 400, 4000).astype(np.int32)
HELD_OUT = np.arange(0, 4000, 2)
TOKENS = int(LENGTHS[HELD_OUT].sum())


def choose(share: float, *, held_out: np.ndarray = HELD_OUT, density: float = 0.5) -> list[int]:
    chosen = choose_evaluated(held_out, LENGTHS, targets_per_token=density, share=share)
    return list(chosen.tolist())


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
def test_a_subset_costs_no_more_than_its_share_and_not_far_less(share: float) -> None:
    chosen = choose(share)
    assert 0.65 * share * TOKENS < LENGTHS[chosen].sum() <= share * TOKENS
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(HELD_OUT.tolist())


def test_a_subset_is_spread_evenly_over_the_stored_order() -> None:
    parts = np.histogram(choose(0.05), bins=10, range=(0, 4000))[0]
    assert parts.max() - parts.min() <= 2


def test_a_smaller_subset_is_part_of_a_larger_one() -> None:
    assert set(choose(0.01)) < set(choose(0.03)) < set(choose(0.1))


def test_similar_shares_give_the_same_samples() -> None:
    assert len({tuple(choose(share)) for share in (0.044, 0.047, 0.05)}) == 1


def test_enough_is_evaluated_at_any_cost_for_an_error_bar() -> None:
    few = choose(0.0, density=0.2)
    assert LENGTHS[few].sum() * 0.2 >= MIN_TARGETS
    assert LENGTHS[few[:-1]].sum() * 0.2 < MIN_TARGETS + 80
    assert len(choose(0.0, density=100.0)) == MIN_SAMPLES
    assert choose(0.0, held_out=HELD_OUT[:3]) == HELD_OUT[:3].tolist()


def test_all_are_evaluated_where_all_can_be_afforded_up_to_the_limit() -> None:
    assert choose(1.0, held_out=HELD_OUT[:50]) == HELD_OUT[:50].tolist()
    assert 0.65 * MAX_TOKENS < LENGTHS[choose(1e9)].sum() <= MAX_TOKENS


def test_a_given_number_takes_the_first_samples_as_it_always_did() -> None:
    ends = np.cumsum(LENGTHS[HELD_OUT])
    assert first_samples(HELD_OUT, LENGTHS, max_tokens=int(ends[6])).tolist() == list(
        HELD_OUT[:7].tolist()
    )
    assert first_samples(HELD_OUT, LENGTHS, max_tokens=1).tolist() == [0]


def windows(*steps: int) -> list[list[Window]]:
    """Return epochs, each a window with this number of steps."""
    one = (np.array([0]),)
    return [[Window(units=(0,), steps=(one,) * count)] for count in steps]


@pytest.mark.parametrize(
    ("epochs", "first", "every", "includes_last", "expected"),
    [
        ([5, 5, 5], 0, 0, False, 3),  # the base, and the ends of two epochs
        ([5, 5, 5], 0, 0, True, 4),
        ([5, 5, 5], 0, 4, False, 4),
        ([5, 5, 5], 0, 5, False, 3),
        ([5, 5, 5], 0, 5, True, 4),
        ([5, 5, 5], 7, 0, False, 2),
        ([5], 0, 100, False, 1),
    ],
)
def test_evaluations_are_counted(
    epochs: list[int], first: int, every: int, includes_last: bool, expected: int
) -> None:
    found = count_evaluations(
        windows(*epochs), first=first, every=every, includes_last=includes_last
    )
    assert found == expected


def test_the_ratio_counts_multiplications() -> None:
    work = Work(weights=1000, width=10, vocabulary=500, trained_rows=100)
    ratio = evaluation_ratio(
        work, trained=(2000.0, 1000.0), evaluated=(20.0, 10.0), num_evaluations=3
    )
    steps = 2000 * 3 * 1000 + 1000 * 2 * 10 * 100
    assert ratio == pytest.approx(3 * EVALUATION_COST * (20 * 1000 + 10 * 10 * 500) / steps)
    assert MAX_RATIO == 0.1
