"""Units as they are ordered from one process, and what became of each.

The pipeline takes its units from here in place of a list. One that fails does not stop the others:
the pipeline is started again behind it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Literal

from carryon.cache.errors import CarryOnError, DiskFullError
from carryon.cache.extraction.sharing.claims import Claims
from carryon.cache.format.receipt import Receipt
from carryon.cache.store.shard_writer import EncodedUnit, Rows, UnitInput

_LOOK_S = 0.05
State = Literal["computed", "present", "busy", "failed", "broken", "full", "limit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a unit: all that leaves the process that was to compute it."""

    unit: int
    state: State
    """`computed` here; `present`: by another; `busy`: another is at work on it; `failed`: so would
    it elsewhere; `broken`: perhaps not by a fresh process; `full`: the disk; `limit`: --max-disk.
    """
    num_tokens: int = 0
    elapsed_s: float = 0.0
    """Seconds of the base's passes over it."""
    error: str = ""
    """In one line."""


class Orders:
    """Ordered units of one process, as a source of units of `run_units`."""

    def __init__(self, claims: Claims) -> None:
        """Prepare; nothing is claimed."""
        self._claims = claims
        self._ordered: SimpleQueue[int | None] = SimpleQueue()
        self._open: dict[int, Future[Outcome]] = {}
        self._at_work: list[int] = []
        """Claimed, and not answered."""
        self._again: list[int] = []
        """Of these, lost by the pipeline with another one: each is now computed alone, so that it
        is known which of them fails."""
        self._is_over = False
        self._reported: list[BaseException] = []
        """Errors of units that were answered; several are written at a time."""

    def extract(self, unit: int) -> Outcome:
        """Have a unit computed and wait for it; called from any thread."""
        future = self._open[unit] = Future()
        self._ordered.put(unit)
        return future.result()

    def serve(self, run: Callable[[], object]) -> None:
        """Call `run`, which takes its units from here, again and again until `close`."""
        while not self._is_over:
            try:
                run()
            except Exception as error:  # of one unit; the others are computed
                self._recover(error)

    def close(self) -> None:
        """Let the pipeline end after the units that it works on."""
        self._is_over = True
        self._ordered.put(None)

    def iter_units(
        self, units: Sequence[int], *, is_over: threading.Event | None = None
    ) -> Iterator[int]:
        """Yield units as they are ordered; none of `units`, which are for other sources."""
        assert not units
        if self._again:
            yield self._again.pop(0)
            return
        while not (is_over and is_over.is_set()):
            try:
                unit = self._ordered.get(timeout=_LOOK_S)
            except Empty:
                continue
            if unit is None:
                return
            try:
                standing = self._claims.take(unit)
            except Exception as error:
                self._answer(_failure(unit, error))
                continue
            if standing == "taken":
                self._at_work.append(unit)
                yield unit
            else:
                self._answer(Outcome(unit=unit, state=standing))

    def write_unit(
        self, unit_input: UnitInput, hidden: Mapping[str, Rows] | EncodedUnit, *, elapsed_s: float
    ) -> Receipt | None:
        """Write and commit a unit and say what became of it; arguments as of `Claims`."""
        unit = unit_input.unit
        try:
            receipt = self._claims.write_unit(unit_input, hidden, elapsed_s=elapsed_s)
        except BaseException as error:
            self._reported.append(error)
            self._answer(_failure(unit, error))
            raise
        outcome = Outcome(unit=unit, state="present")
        if receipt is not None:
            outcome = Outcome(
                unit=unit,
                state="computed",
                num_tokens=receipt.num_tokens,
                elapsed_s=elapsed_s,
            )
        self._answer(outcome)
        return receipt

    def give_back(self, unit: int) -> None:
        """Release a unit for which the disk limit leaves no room."""
        self._claims.give_back(unit)
        self._answer(Outcome(unit=unit, state="limit"))

    def num_others(self) -> int:
        """Return how many units other processes are working on."""
        return self._claims.num_others()

    def _recover(self, error: Exception) -> None:
        """Answer for the unit that ended the pipeline; those beside it are computed again."""
        lost = [unit for unit in self._at_work if unit not in self._again]
        if not any(error is each for each in self._reported):
            if not lost:
                raise error  # of no unit: a mistake of ours
            if len(lost) == 1:
                [unit] = lost
                with suppress(OSError, KeyError):
                    self._claims.give_back(unit)
                self._answer(_failure(unit, error))
                return
        self._reported.clear()  # they hold the states of their units
        self._again += lost

    def _answer(self, outcome: Outcome) -> None:
        if outcome.unit in self._at_work:
            self._at_work.remove(outcome.unit)
        self._open.pop(outcome.unit).set_result(outcome)


def _failure(unit: int, error: BaseException) -> Outcome:
    state: State = "failed" if isinstance(error, CarryOnError) else "broken"
    if isinstance(error, DiskFullError):
        state = "full"
    kind = "" if isinstance(error, CarryOnError) else f"{type(error).__name__}: "
    return Outcome(unit=unit, state=state, error=kind + " ".join(str(error).split())[:500])
