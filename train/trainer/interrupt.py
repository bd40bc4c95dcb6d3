"""A wish to stop, noticed between steps instead of in the middle of one."""

import signal
import threading
from types import FrameType, TracebackType


class StopRequest:
    """Within the `with` block the first Ctrl-C (or SIGTERM) only sets `is_set`.

    A second one stops at once. Outside the main thread, where signals cannot be caught, nothing
    is changed.
    """

    def __init__(self) -> None:
        """Nothing is asked yet."""
        self.is_set = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        """Listen."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the signals as they were."""
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]  # what signal() returned

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
