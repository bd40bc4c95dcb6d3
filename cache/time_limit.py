"""A limit on the processor time of code that may not end: templates, patterns and verifiers."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TimeLimitError(ValueError):
    """A block takes more time than any that is meant."""


@contextmanager
def limited_time(seconds: float) -> Iterator[None]:
    """Stop the block after so much processor time, if this is the main thread and no other limit
    holds.

    Code in C is stopped when it looks for signals, as regular expressions and products of large
    numbers do.

    Raises:
        TimeLimitError: it took longer.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGVTALRM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeLimitError(f"it takes more than {seconds:g} s")

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds)  # again for code that catches it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
