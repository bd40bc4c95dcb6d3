"""Which units are to be handed out, are out, or have failed. Nothing of Ray is here."""

import heapq
from collections import Counter
from collections.abc import Sequence

from carryon.cache.extraction.ray_actors.orders import Outcome

_MOST_TRIES = 4
"""Of a unit whose process ends or breaks."""
_MOST_FAILED = 20
_BUSY_S = 1.0


class Ledger:
    """The units of a job. Times are of one clock, in seconds."""

    def __init__(self, units: Sequence[int]) -> None:
        """Begin with all units to be handed out, in order."""
        self._waiting = [(0.0, unit) for unit in units]  # heaps: (when, unit)
        heapq.heapify(self._waiting)
        self._suspects: list[tuple[float, int]] = []
        """Units that were in a process when it ended. They are tried alone, as the unit that ends
        processes would take those beside it along."""
        self._out: set[int] = set()
        self._tries: Counter[int] = Counter()
        self.failed: dict[int, str] = {}
        """Unit -> why."""
        self.stopped: Outcome | None = None
        """What ended the job early: a full disk or the disk limit."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is out, or will be handed out."""
        is_empty = not self._waiting and not self._suspects
        return not self._out and (self._is_stopped or is_empty)

    def is_suspect(self, unit: int) -> bool:
        """Return whether nothing is to be computed beside a unit."""
        return self._tries[unit] > 0

    def hand_out(self, now: float, *, is_idle: bool) -> int | None:
        """Return a unit to compute; None if there is none at the moment.

        Args:
            now: time.
            is_idle: whether the process that asks has no other unit, so that it may have a suspect.
        """
        if self._is_stopped:
            return None
        for heap in (self._suspects, self._waiting) if is_idle else (self._waiting,):
            if heap and heap[0][0] <= now:
                _, unit = heapq.heappop(heap)
                self._out.add(unit)
                return unit
        return None

    def settle(self, outcome: Outcome, now: float) -> None:
        """Note what became of a unit that was out."""
        unit = outcome.unit
        self._out.remove(unit)
        if outcome.state == "busy":
            heap = self._suspects if self.is_suspect(unit) else self._waiting
            heapq.heappush(heap, (now + _BUSY_S, unit))
        elif outcome.state == "broken":
            self._retry(unit, outcome.error, now)
        elif outcome.state == "failed":
            self.failed[unit] = outcome.error
        elif outcome.state in ("full", "limit"):
            self.stopped = self.stopped or outcome

    def lose(self, unit: int, reason: str, now: float, *, counts: bool = True) -> None:
        """Note that the process of a unit that was out has ended.

        Args:
            unit: that was out.
            reason: what is known of the end.
            now: time.
            counts: whether the unit may have ended it.
        """
        self._out.remove(unit)
        if counts:
            self._retry(unit, reason, now)
        else:
            heap = self._suspects if self.is_suspect(unit) else self._waiting
            heapq.heappush(heap, (now, unit))

    def _retry(self, unit: int, reason: str, now: float) -> None:
        self._tries[unit] += 1
        if self._tries[unit] < _MOST_TRIES:
            heapq.heappush(self._suspects, (now, unit))
        else:
            self.failed[unit] = f"tried {_MOST_TRIES} times: {reason}"

    @property
    def _is_stopped(self) -> bool:
        return self.stopped is not None or len(self.failed) >= _MOST_FAILED
