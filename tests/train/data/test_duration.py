"""Predicted seconds of a run, by hand."""

import pytest

from carryon.train.data.duration import Evaluations, awaited_steps, seconds_per_token
from carryon.train.data.evaluation_set import Work


@pytest.mark.parametrize(
    ("left", "awaited"), [(0, 0), (7, 0), (8, 3), (24, 6), (40, 10), (1099, 10)]
)
def test_ten_steps_are_timed_or_a_quarter_of_them(left: int, awaited: int) -> None:
    assert awaited_steps(left) == awaited


def test_the_first_step_sets_up_memory_and_does_not_count() -> None:
    assert seconds_per_token([9.0, 1.0, 3.0], [100, 100, 300], skipped=1) == 0.01
    assert seconds_per_token([2.0], [100], skipped=1) == 0.02


def test_evaluations_cost_the_base_and_the_carry_on_forward() -> None:
    work = Work(weights=100, width=10, vocabulary=50, trained_rows=50)
    evaluations = Evaluations(
        left=3, base_s=2.0, tokens=1000, last_tokens=4000, last_targets=500, target_s=0.01
    )
    # Of 3 * 100 + 2 * 10 * 50 * 0.5 = 800 multiplications per token, 100 are forward.
    forward_s = 0.008 / 8
    expected = 3 * (2.0 + 1000 * forward_s) + 2 * 500 * 0.01 + 4000 * forward_s
    assert evaluations.seconds(work, token_s=0.008, density=0.5) == pytest.approx(expected)


def test_a_run_that_evaluates_nothing_costs_its_steps() -> None:
    work = Work(weights=1, width=1, vocabulary=1, trained_rows=1)
    none = Evaluations(left=1, base_s=0.0, tokens=9, last_tokens=9, last_targets=9, target_s=1.0)
    assert none.seconds(work, token_s=1.0, density=1.0) == 0
