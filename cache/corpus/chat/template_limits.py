"""Limits on chat templates, which are programs and may come from anyone.

The sandbox of Jinja keeps a template from files and code, not from loops without an end nor from
texts of gigabytes. Time is that of the processor in the main thread, where a timer can be had.
"""

import operator
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

MAX_SECONDS = 1.0
"""Of a rendering, which takes milliseconds."""
MAX_LENGTH = 10_000_000
"""Of a text or list that a template multiplies."""
_MAX_BITS = 10_000


class TemplateLimitError(ValueError):
    """A template takes more time or memory than any that is meant."""


@cache
def compile_limited(source: str) -> Any:  # noqa: ANN401 -- a template of Jinja
    """Return a template as transformers compiles it, whose products are limited."""
    # Its own function: apply_chat_template copies all messages at each of many calls
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template("").environment
    environment.intercepted_binops = frozenset(["*", "**"])  # not computed while compiling either
    environment.binop_table = {**environment.binop_table, "*": _multiply, "**": _power}
    return environment.from_string(source)


@contextmanager
def limited_time() -> Iterator[None]:
    """Stop the block after MAX_SECONDS.

    Raises:
        TemplateLimitError: it took longer.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGVTALRM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TemplateLimitError(f"it takes more than {MAX_SECONDS} s")

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_DFL)


def _multiply(left: Any, right: Any) -> Any:  # noqa: ANN401 -- values of a template
    for many, number in ((left, right), (right, left)):
        if isinstance(number, int) and hasattr(many, "__len__") and len(many) * number > MAX_LENGTH:
            raise TemplateLimitError(f"it makes a text or list of more than {MAX_LENGTH:,}")
    return operator.mul(left, right)


def _power(left: Any, right: Any) -> Any:  # noqa: ANN401 -- values of a template
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_BITS:
        raise TemplateLimitError(f"it makes a number of more than {_MAX_BITS:,} bits")
    return operator.pow(left, right)
