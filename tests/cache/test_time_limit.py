"""Code without an end is stopped, also where it catches errors or runs in C."""

import re
import signal
import threading

import pytest

from carryon.cache.time_limit import TimeLimitError, limited_time

SECONDS = 0.1


@pytest.mark.parametrize(
    "endless",
    [
        lambda: any(False for _ in iter(int, 1)),
        lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
        lambda: 9**9**9,
    ],
)
def test_endless_code_is_stopped_and_the_timer_with_it(endless: object) -> None:
    with pytest.raises(TimeLimitError, match=r"it takes more than 0.1 s"), limited_time(SECONDS):
        endless()  # type: ignore[operator]
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_code_that_catches_the_first_error_gets_another() -> None:
    caught = []

    def catch_one() -> None:
        try:
            any(False for _ in iter(int, 1))
        except TimeLimitError:
            caught.append(1)
            any(False for _ in iter(int, 1))

    with pytest.raises(TimeLimitError), limited_time(SECONDS):
        catch_one()
    assert caught == [1]


def test_the_limit_of_the_outer_block_holds_and_other_threads_have_none() -> None:
    with pytest.raises(TimeLimitError, match="0.1 s"), limited_time(SECONDS), limited_time(1000):
        any(False for _ in iter(int, 1))
    done = []

    def run() -> None:
        with limited_time(SECONDS):
            done.append(1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [1]
