"""Timing of several ways."""

import time

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


@pytest.mark.parametrize(("num_threads", "is_counted"), [(1, False), (2, True)])
def test_one_thread_is_timed_without_the_time_that_it_waits(
    num_threads: int, is_counted: bool
) -> None:
    seconds = least_seconds({"wait": lambda: time.sleep(0.03)}, num_threads=num_threads)
    assert (seconds["wait"] > 0.02) == is_counted
