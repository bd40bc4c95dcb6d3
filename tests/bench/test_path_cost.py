"""Steps that each way of releasing versions takes, counted and by formula."""

from fractions import Fraction

import pytest

from carryon.tools.bench.path_cost import steps_by_formula, steps_to_take
from carryon.train.optim.lr_paths import Paradigm

ENDS = [100, 200, 300, 400]


def test_four_versions_cost_58_and_40_percent_of_those_from_scratch() -> None:
    ways: tuple[Paradigm, ...] = ("scratch", "switch", "restart", "low", "wsd-s", "wsm")
    steps = {way: steps_by_formula(way, versions=4, steps=100, alpha=0.6) for way in ways}

    assert steps["switch"] / steps["scratch"] == Fraction(58, 100)
    assert {steps[way] / steps["scratch"] for way in ways[2:]} == {Fraction(40, 100)}


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0])
def test_counted_steps_are_those_of_the_formula(alpha: float) -> None:
    for way in ("scratch", "switch", "restart"):
        assert steps_to_take(way, ENDS, alpha=alpha) == steps_by_formula(  # type: ignore[arg-type]
            way,  # type: ignore[arg-type]
            versions=4,
            steps=100,
            alpha=alpha,
        )
