"""The learning rate is a pure function of the step."""

import pytest

from carryon.cache.errors import InputError
from carryon.train.config import OptimizationSettings
from carryon.train.optim.lr_schedule import learning_rate


def _curve(num_steps: int = 100, **values: object) -> list[float]:
    settings = OptimizationSettings(learning_rate=1.0, **values)  # type: ignore[arg-type]
    return [
        learning_rate(step, num_steps=num_steps, settings=settings) for step in range(num_steps)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant", "knee", "multistep"])
def test_the_warm_up_rises_in_equal_parts_to_the_top(schedule: str) -> None:
    assert _curve(schedule=schedule, warmup_ratio=0.1, min_lr_ratio=0.1)[:10] == pytest.approx(
        [0.1 * (step + 1) for step in range(10)]
    )


def test_cosine_falls_all_the_way_to_its_end() -> None:
    curve = _curve(schedule="cosine", warmup_ratio=0.1, min_lr_ratio=0.25)

    assert curve[10:] == sorted(curve[10:], reverse=True)
    assert curve[-1] == pytest.approx(0.25)
    assert curve[54] == pytest.approx(0.625)  # half of the 90 steps after the warm-up


def test_wsd_stays_at_the_top_and_falls_in_the_last_part() -> None:
    curve = _curve(schedule="wsd", warmup_ratio=0.1, decay_ratio=0.2)

    assert curve[9:80] == [1.0] * 71
    assert curve[80:] == pytest.approx([1 - (step + 1) / 20 for step in range(20)])


def test_constant_stays() -> None:
    assert _curve(schedule="constant", warmup_ratio=0.0) == [1.0] * 100


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_run_of_one_step_has_a_learning_rate(schedule: str) -> None:
    (rate,) = _curve(num_steps=1, schedule=schedule)

    assert 0 <= rate <= 1


def test_knee_stays_for_its_part_and_falls_in_a_line_to_its_end() -> None:
    curve = _curve(schedule="knee", warmup_ratio=0.0, explore_ratio=0.6, min_lr_ratio=0.1)

    assert curve[:60] == pytest.approx([1.0] * 60)
    assert curve[79] == pytest.approx(0.55)
    assert curve[-1] == 0.1


def test_multistep_falls_by_equal_factors_after_80_and_90_percent() -> None:
    curve = _curve(schedule="multistep", warmup_ratio=0.0, min_lr_ratio=0.1)

    assert curve == pytest.approx([1.0] * 80 + [0.1**0.5] * 10 + [0.1] * 10)


def test_multistep_to_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="min_lr_ratio: expected more than 0 for multistep"):
        OptimizationSettings(schedule="multistep")
