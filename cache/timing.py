"""Choice of the fastest of several ways by timing them. Imports nothing large."""

import time
from collections.abc import Callable, Mapping

_ROUNDS = 3
_HOPELESS = 1.3  # a call that takes so much longer than the fastest is not timed again
_HOPELESS_BUSY = 20.0  # the same of a clock that runs on while other processes use the cores


def least_seconds(
    calls: Mapping[str, Callable[[], object]], *, num_threads: int
) -> dict[str, float]:
    """Return the least seconds of each call, timed in turn.

    One thread is timed by its own clock, which stands while other processes use the core. Several
    are timed by that of the wall, on which a call that has to wait is up to ten times as slow: each
    is timed in every round, so that one wait decides nothing.

    Args:
        calls: by name; each ends when its work is done.
        num_threads: that a call computes with.
    """
    if num_threads == 1:
        clock, hopeless = time.thread_time, _HOPELESS
    else:
        clock, hopeless = time.perf_counter, _HOPELESS_BUSY
    seconds = dict.fromkeys(calls, float("inf"))
    for number in range(_ROUNDS):
        least = min(seconds.values())
        for name, call in calls.items():
            if number > 0 and seconds[name] > hopeless * least:
                continue
            start = clock()
            call()
            seconds[name] = min(seconds[name], clock() - start)
    return seconds
