"""Read what comes next in a thread, a few items ahead of who takes them."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, Self, TypeVar

T = TypeVar("T")
_LOOK_S, _CHECK_S = 0.01, 0.1


class ReadAhead(Generic[T]):
    """Items of an iterator that runs in a thread, as a context manager that ends it.

    An error of the iterator is raised where its next item would have come.
    """

    def __init__(self, make: Callable[["ReadAhead[T]"], Iterator[T]], *, most: int) -> None:
        """Prepare.

        Args:
            make: returns the iterator, which is run in the thread and has to end soon once
                `is_over` is set.
            most: items that wait to be taken.
        """
        self.is_over = threading.Event()
        """Set when nobody takes items any more."""
        self.is_cut = False
        """Set by the iterator if it ends before all is read."""
        self.waited_s = 0.0
        """Seconds that were waited for items but the first, which nothing can be ahead of."""
        self._waiting: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=most)
        self._make = make
        self._thread = threading.Thread(target=self._read, name="carryon-reader", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self._thread.join()

    def items(self, check: Callable[[], object]) -> Iterator[T]:
        """Yield the items as they come.

        Args:
            check: called while there is none yet; what it raises ends the wait.
        """
        is_first = True
        while True:
            started_at = time.perf_counter()
            item = self._next(check)
            if not is_first:
                self.waited_s += time.perf_counter() - started_at
            is_first = False
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item

    def _next(self, check: Callable[[], object]) -> T | BaseException | None:
        while True:
            try:
                return self._waiting.get(timeout=_CHECK_S)
            except queue.Empty:
                check()

    def wait_until_taken(self) -> None:
        """Wait, in the thread, until every item so far was taken, or it is over."""
        while not self._waiting.empty() and not self.is_over.is_set():
            self.is_over.wait(_LOOK_S)

    def _read(self) -> None:
        try:
            for item in self._make(self):
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: T | BaseException | None) -> bool:
        while not self.is_over.is_set():
            try:
                self._waiting.put(item, timeout=_LOOK_S)
            except queue.Full:
                continue
            return True
        return False
