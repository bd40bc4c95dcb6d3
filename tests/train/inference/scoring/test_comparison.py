"""Intervals, sign test and pass@k against values worked out elsewhere."""

from itertools import combinations
from math import comb

import pytest

from carryon.train.inference.scoring.comparison import (
    compare_paired,
    pass_at_k,
    sign_test,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("right", "num", "low", "high"),
    [
        (8, 60, 0.0691, 0.2417),  # R: binom::binom.wilson
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (71, 100, 0.6146, 0.7899),
    ],
)
def test_wilson_interval(right: int, num: int, low: float, high: float) -> None:
    assert wilson_interval(right, num) == pytest.approx((low, high), abs=1e-4)


def test_the_interval_of_none_and_of_all_ends_exactly() -> None:
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


@pytest.mark.parametrize(
    ("won", "lost", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (9, 1, 22 / 1024), (0, 6, 1 / 32)]
)
def test_sign_test_is_exact_and_two_sided(won: int, lost: int, p: float) -> None:
    assert sign_test(won, lost) == pytest.approx(p)
    assert sign_test(lost, won) == pytest.approx(p)


def test_a_large_sign_test_does_not_overflow() -> None:
    assert sign_test(2_000, 1_000) < 1e-70


def test_pairs_are_counted_against_the_first() -> None:
    paired = compare_paired([1, 0, 0, 0.5, 1], [1, 1, 0, 0.75, 0])
    assert (paired.won, paired.lost) == (2, 1)


@pytest.mark.parametrize(("num", "right"), [(5, 0), (5, 2), (5, 5), (8, 3)])
def test_pass_at_k_is_the_mean_over_all_choices(num: int, right: int) -> None:
    answers = [True] * right + [False] * (num - right)
    for k in range(1, num + 1):
        chosen = sum(any(each) for each in combinations(answers, k)) / comb(num, k)
        assert pass_at_k(num, right, k) == pytest.approx(chosen)
