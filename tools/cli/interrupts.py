"""Ctrl-C that ends a command also where Python would lose it.

Python raises KeyboardInterrupt wherever it is. In the midst of an import that is not safe: a
library takes it for an error of its own and goes on, and torch ends the process by force. In a
callback of the memory management it is only printed. So an import is left at once where a command
has only begun, and is finished first elsewhere; what was only printed is sent again.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

CODE = 130
_AGAIN_S = 0.05


@contextmanager
def interrupts(message: str, *, inside: FrameType, own: str) -> Iterator[list[int]]:
    """Yield a list that is no longer empty once Ctrl-C was raised.

    Where Ctrl-C is not handled as Python does by default, or not here, that stays.

    Args:
        message: printed where an import is left.
        inside: frame of the program; imports that it is itself part of do not count.
        own: package whose modules import what a command needs before it does anything.
    """
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before is not signal.default_int_handler:
        yield seen
        return
    delayed = _Delayed()

    def notice(number: int, frame: FrameType | None) -> None:
        is_asked_again = delayed.take()
        importer = _importer(frame, inside)
        if importer is None:
            seen.append(number)
            signal.default_int_handler(number, frame)
        elif is_asked_again or f"{importer}.".startswith(f"{own}."):
            with suppress(OSError):  # nobody reads it
                os.write(2, f"{message}\n".encode())
            os._exit(CODE)  # no work has begun; or whoever presses twice does not wait
        else:
            delayed.send()

    hook = sys.unraisablehook
    signal.signal(signal.SIGINT, notice)
    sys.unraisablehook = _resending(delayed, hook)
    try:
        yield seen
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)


class _Delayed:
    """Ctrl-C that is sent to the main thread once more, a moment later."""

    def __init__(self) -> None:
        self._is_sent = self._is_waiting = False

    def send(self) -> None:
        """Send it."""
        self._is_waiting = True
        timer = threading.Timer(_AGAIN_S, self._send)
        timer.daemon = True
        timer.start()

    def take(self) -> bool:
        """Return whether a signal that came is one of the user while another waits."""
        is_new, was_waiting = not self._is_sent, self._is_waiting
        self._is_sent = False
        return is_new and was_waiting

    def _send(self) -> None:
        self._is_sent = True
        with suppress(ProcessLookupError):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _resending(delayed: _Delayed, hook: Callable[[Any], object]) -> Callable[[Any], object]:
    """Return a hook for errors that cannot be raised."""

    def resend(lost: Any) -> None:  # noqa: ANN401 -- sys.UnraisableHookArgs
        if lost.exc_type is KeyboardInterrupt:
            delayed.send()
        else:
            hook(lost)

    return resend


def _importer(frame: FrameType | None, inside: FrameType) -> str | None:
    """Return the module that began the outermost import under way; None if there is none."""
    importer, is_import = None, False
    while frame is not None and frame is not inside:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            is_import = True
        elif is_import:
            importer, is_import = str(frame.f_globals.get("__name__")), False
        frame = frame.f_back
    return importer
