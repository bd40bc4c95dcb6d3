"""Several runs share windows; one run is the case of one."""

from collections.abc import Sequence

import numpy as np

from carryon.train.data.joint_sampler import JointOrder, join_orders
from carryon.train.data.sampler import Window, plan_epoch, take_steps

NUM_SAMPLES = 300
LENGTHS = np.random.default_rng(1).integers(10, 90, NUM_SAMPLES).astype(np.int32)
UNITS = (np.arange(NUM_SAMPLES) // 25).astype(np.int64)


def _plan(*, tokens_per_step: int = 500, shuffle_seed: int = 0) -> list[Window]:
    return plan_epoch(
        np.arange(NUM_SAMPLES),
        lengths=LENGTHS,
        units=UNITS,
        seed=(0,),
        epoch=0,
        tokens_per_step=tokens_per_step,
        micro_batch_tokens=0,
        window_units=4,
        shuffle_seed=shuffle_seed,
    )


def _join(orders: Sequence[Sequence[Window]], done: Sequence[int]) -> JointOrder:
    return join_orders(orders, done, rank=0, world_size=1)


def _taken(order: JointOrder, run: int) -> list[list[int]]:
    made = [step for window in order.windows for step in window.steps]
    return [made[number][0].tolist() for number, step in enumerate(order.steps) if run in step.runs]


def _flat(windows: Sequence[Window]) -> list[list[int]]:
    return [step[0].tolist() for window in windows for step in window.steps]


def test_one_run_is_what_is_left_of_its_order() -> None:
    windows = _plan()

    for done in (0, 1, 17, len(_flat(windows))):
        order = _join([windows], [done])
        assert _taken(order, 0) == _flat(take_steps(windows, first=done))
        assert [window.units for window in order.windows] == [
            window.units for window in take_steps(windows, first=done)
        ]


def test_each_run_takes_its_own_steps_and_windows_are_read_once() -> None:
    orders = [_plan(), _plan(shuffle_seed=1), _plan(tokens_per_step=300)]

    order = _join(orders, [0, 0, 0])

    for run, windows in enumerate(orders):
        assert _taken(order, run) == _flat(windows)
    assert [window.units for window in order.windows] == [window.units for window in orders[0]]


def test_runs_with_the_same_windows_share_their_steps() -> None:
    windows = _plan()

    order = _join([windows, windows], [0, 0])

    assert {step.runs for step in order.steps} == {(0, 1)}
    assert len(order.steps) == len(_flat(windows))


def test_runs_at_other_positions_each_get_what_is_left() -> None:
    windows, other = _plan(), _plan(shuffle_seed=1)

    order = _join([windows, windows, other], [3, 20, 11])

    assert _taken(order, 0) == _flat(windows)[3:]
    assert _taken(order, 1) == _flat(windows)[20:]
    assert _taken(order, 2) == _flat(other)[11:]


def test_a_shorter_run_ends_before_the_others() -> None:
    windows = _plan()

    order = _join([windows + windows, windows], [0, 0])

    assert len(_taken(order, 0)) == 2 * len(_taken(order, 1))


def test_processes_share_every_step() -> None:
    windows = _plan()
    parts = [join_orders([windows], [0], rank=rank, world_size=2) for rank in range(2)]

    assert [len(part.steps) for part in parts] == [len(_flat(windows))] * 2
    for step, mine, theirs in zip(
        _flat(windows), _taken(parts[0], 0), _taken(parts[1], 0), strict=True
    ):
        assert sorted(mine + theirs) == sorted(step)


def test_a_process_without_a_sample_of_a_step_has_no_rows_of_it() -> None:
    window = Window(units=(0,), steps=((np.array([4]),), (np.array([5, 6]),)))

    order = join_orders([[window]], [0], rank=1, world_size=2)

    assert [step.has_rows for step in order.steps] == [False, True]
    assert _flat(order.windows) == [[6]]
