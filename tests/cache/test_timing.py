"""Timing of several ways."""

import time
from functools import partial

import pytest

from carryon.cache.timing import least_seconds


def test_a_slow_call_is_not_timed_again() -> None:
    calls = {"fast": 0, "slow": 0}

    def call(name: str, size: int) -> None:
        calls[name] += 1
        sum(range(size))

    seconds = least_seconds(
        {"slow": lambda: call("slow", 1_000_000), "fast": lambda: call("fast", 1000)},
        num_threads=1,
    )
    assert calls == {"slow": 1, "fast": 3}
    assert seconds["slow"] > 10 * seconds["fast"] > 0


def test_a_call_that_had_to_wait_once_is_timed_again() -> None:
    waits = {"fast": [0.4, 0.0, 0.0], "slow": [0.1, 0.1, 0.1]}  # another process had its core

    def call(name: str) -> None:
        time.sleep(waits[name].pop(0))

    calls = {name: partial(call, name) for name in waits}
    seconds = least_seconds(calls, num_threads=2)
    assert seconds["fast"] < seconds["slow"]


@pytest.mark.parametrize(("num_threads", "is_counted"), [(1, False), (2, True)])
def test_one_thread_is_timed_without_the_time_that_it_waits(
    num_threads: int, is_counted: bool
) -> None:
    seconds = least_seconds({"wait": lambda: time.sleep(0.03)}, num_threads=num_threads)
    assert (seconds["wait"] > 0.02) == is_counted
