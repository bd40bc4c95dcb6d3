"""Learning-rate paths as pure functions."""

import pytest

from carryon.cache.errors import InputError
from carryon.train.config import OptimizationSettings
from carryon.train.optim.lr_paths import Paradigm, branch_point, path_rate

ENDS = [100, 200, 300, 400]
TOP, BOTTOM = 3e-4, 3e-5


def _path(
    paradigm: Paradigm, version: int, *, schedule: str = "cosine", warmup_ratio: float = 0.0
) -> list[float]:
    settings = OptimizationSettings(
        learning_rate=TOP,
        min_lr_ratio=0.1,
        schedule=schedule,  # type: ignore[arg-type]
        warmup_ratio=warmup_ratio,
    )
    return [
        path_rate(step, paradigm=paradigm, version=version, ends=ENDS, alpha=0.6, settings=settings)
        for step in range(ENDS[version - 1])
    ]


@pytest.mark.parametrize("schedule", ["cosine", "knee", "multistep"])
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_branch_is_the_trunk_up_to_its_point_and_ends_at_the_minimum(
    schedule: str, version: int
) -> None:
    branch = _path("switch", version, schedule=schedule, warmup_ratio=0.05)
    trunk = _path("trunk", version, schedule=schedule, warmup_ratio=0.05)

    point = 100 * version - 60
    assert branch[:point] == trunk[:point]
    assert branch[-1] == TOP * 0.1
    assert branch[point:] == sorted(branch[point:], reverse=True)
    assert set(trunk[5:]) == {TOP}


def test_branches_have_the_numbers_of_their_schedules() -> None:
    middle = 100 - 60 + 29  # half of the fall is done after this step

    assert _path("switch", 1)[middle] == pytest.approx((TOP + BOTTOM) / 2)
    assert _path("switch", 1, schedule="knee")[middle] == pytest.approx((TOP + BOTTOM) / 2)
    multistep = _path("switch", 1, schedule="multistep")
    assert multistep[87:89] == pytest.approx([TOP, TOP * 0.1**0.5])
    assert multistep[93:95] == pytest.approx([TOP * 0.1**0.5, BOTTOM])


def test_from_scratch_a_version_has_one_schedule_over_all_data() -> None:
    path = _path("scratch", 4)

    assert path[199] == pytest.approx((TOP + BOTTOM) / 2)
    assert path[-1] == TOP * 0.1


def test_with_restart_every_version_has_its_own_schedule() -> None:
    path = _path("restart", 3, warmup_ratio=0.1)

    assert path[:100] == path[100:200] == path[200:]
    assert path[9] == TOP
    assert path[99] == TOP * 0.1


def test_staying_low_keeps_the_minimum_after_the_first_version() -> None:
    path = _path("low", 3)

    assert path[:100] == _path("scratch", 1)
    assert path[100:] == [TOP * 0.1] * 200


def test_wsd_s_starts_from_the_decayed_branch() -> None:
    path = _path("wsd-s", 2)

    assert path[:100] == _path("switch", 1)
    assert path[100:140] == [TOP] * 40
    assert path[-1] == TOP * 0.1


def test_every_path_warms_up() -> None:
    for paradigm in ("scratch", "restart", "low", "switch", "trunk", "wsd-s", "wsm"):
        assert _path(paradigm, 1, warmup_ratio=0.1)[:10] == pytest.approx(  # type: ignore[arg-type]
            [TOP * (step + 1) / 10 for step in range(10)]
        )


def test_fewer_steps_than_alpha_allows_are_refused() -> None:
    with pytest.raises(InputError, match="alpha: expected 0.1 of the increment's 10 steps to be 2"):
        branch_point(100, 110, alpha=0.1)
