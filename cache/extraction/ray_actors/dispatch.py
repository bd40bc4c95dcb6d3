"""Units handed out to actors of Ray until each is computed, whoever of them dies.

Actors rather than `map_batches` of Ray Data: there an actor is restarted and its unit tried again
without limit, so a unit that kills its process never ends; and a pool waits for a block, not for
the store. A unit may run twice or at once in two places: claims make that harmless.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import ModuleType
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.extraction.ray_actors.actor import Job, Open, Started, UnitActor
from carryon.cache.extraction.ray_actors.cluster import nodes_of
from carryon.cache.extraction.ray_actors.ledger import Ledger
from carryon.cache.extraction.ray_actors.orders import Outcome
from carryon.cache.extraction.ray_actors.slots import Slot, count_slots

logger = logging.getLogger(__name__)

_AHEAD = 3
"""Units of an actor at a time: one is written, one computed, one waits so that none is missed."""
_LOOK_S = 5.0
"""Between two looks for nodes that have joined."""
_WAIT_S = 0.5
_SILENT_S = 30.0
_MOST_STARTS = 3
"""Actors that may die while they load the base, or as many as are there, before a unit is computed:
a node that goes takes all of its actors along."""
_MOST_LINES = 8
_END_S = 10.0


@dataclass(kw_only=True)
class _Actor:
    """An actor as this process sees it."""

    number: int
    handle: Any
    calls: dict[Any, int] = field(default_factory=dict)
    """Reference of a call -> its unit."""
    start: Any = None
    """Reference of the call that loads the base; None when it has."""
    host: str = ""
    token: str = ""
    num_units: int = 0
    num_tokens: int = 0
    ready_at: float = 0.0
    last_at: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the units that are finished."""
        return self.num_tokens / max(self.last_at - self.ready_at, 1e-9)


class Actors:
    """Actors of a job, and the units that they have, as one loop."""

    def __init__(
        self,
        ray: ModuleType,
        job: Job,
        *,
        slot: Slot,
        workers: int,
        open_job: Open,
        on_death: Callable[[str], None],
    ) -> None:
        """Prepare; nothing is started.

        Args:
            ray: the connected module.
            job: of each actor.
            slot: what each gets.
            workers: actors; 0: as many as the nodes have room for, those that join counted.
            open_job: what an actor does with the job.
            on_death: called with the token of an actor that is dead.
        """
        self._ray, self._job, self._slot, self._workers = ray, job, slot, workers
        self._open_job, self._on_death = open_job, on_death
        resources = {"num_cpus": slot.cpus, "num_gpus": slot.gpus, "scheduling_strategy": "SPREAD"}
        self._class = ray.remote(UnitActor).options(
            **resources, max_concurrency=_AHEAD + 1, max_restarts=0, max_task_retries=0
        )
        self._actors: list[_Actor] = []
        self._ended: list[_Actor] = []
        self._num_refused = self._num_died = self._num_made = 0
        self._last_error = ""
        self._look_at = 0.0

    def compute(self, units: Sequence[int], note: Callable[[str], None]) -> Ledger:
        """Have the units computed and return what became of them.

        Args:
            units: to compute.
            note: is told of the actors' speed, for a bar.

        Raises:
            InputError: no actor can load the base.
        """
        ledger = Ledger(units)
        silent_since, has_warned = time.monotonic(), False
        try:
            while not ledger.is_over:
                now = time.monotonic()
                if now >= self._look_at:
                    self._start_missing()
                    self._look_at = now + _LOOK_S
                self._hand_out(ledger, now)
                calls = {ref: actor for actor in self._actors for ref in actor.calls}
                starts = {actor.start: actor for actor in self._actors if actor.start is not None}
                refs = [*calls, *starts]
                for ref in self._ready(refs):
                    silent_since = now
                    self._take(ref, starts.get(ref) or calls[ref], ledger)
                if starts and len(starts) == len(self._actors) and not has_warned:
                    has_warned = now - silent_since > _SILENT_S
                    if has_warned:
                        logger.warning(self._pending_text(len(starts)))
                note(self._speeds())
        finally:
            self._end()
        return ledger

    def report(self) -> list[str]:
        """Return a line for each actor, or one for all where there are many."""
        actors = [each for each in [*self._ended, *self._actors] if each.num_units]
        if len(actors) > _MOST_LINES:
            speeds = sorted(each.tokens_per_second for each in actors)
            slowest = min(actors, key=lambda each: each.tokens_per_second)
            return [
                f"{len(actors)} actors: {median(speeds):,.0f} tokens/s each (median), "
                f"{speeds[0]:,.0f} to {speeds[-1]:,.0f}; slowest: actor {slowest.number} "
                f"on {slowest.host}"
            ]
        return [
            f"actor {each.number} on {each.host}: {each.num_units:,} units, "
            f"{each.num_tokens:,} tokens, {each.tokens_per_second:,.0f} tokens/s"
            for each in actors
        ]

    def _ready(self, refs: list[Any]) -> list[Any]:
        """Wait a moment for calls, and return all that are done."""
        if not refs:
            time.sleep(_WAIT_S)
            return []
        done, _ = self._ray.wait(refs, num_returns=1, timeout=_WAIT_S)
        if done:
            done, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
        return list(done)

    def _start_missing(self) -> None:
        """Start an actor for each slot that has none."""
        room = self._workers or count_slots(nodes_of(self._ray), self._slot)
        for _ in range(len(self._actors), room - self._num_refused):
            self._num_made += 1
            handle = self._class.remote(self._open_job)
            actor = _Actor(number=self._num_made, handle=handle)
            actor.start = handle.start.remote(self._job)
            self._actors.append(actor)
        if not self._actors and (self._num_refused or not self._num_made):
            raise InputError(self._last_error or self._pending_text(0))

    def _hand_out(self, ledger: Ledger, now: float) -> None:
        """Give units to actors, to those that have fewest first."""
        for depth in range(_AHEAD):
            for actor in self._actors:
                has_suspect = any(map(ledger.is_suspect, actor.calls.values()))
                if actor.start is None and len(actor.calls) == depth and not has_suspect:
                    if (unit := ledger.hand_out(now, is_idle=depth == 0)) is None:
                        return
                    actor.calls[actor.handle.extract.remote(unit)] = unit

    def _take(self, ref: Any, actor: _Actor, ledger: Ledger) -> None:  # noqa: ANN401
        """Take the result of a call."""
        if actor not in self._actors:
            return  # it died, as another call has told
        now = time.monotonic()
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            self._lose(actor, error, ledger)
            return
        if isinstance(result, Started):
            actor.start, actor.host, actor.token = None, result.host, result.token
            actor.ready_at = actor.last_at = now
            if result.error:
                self._refuse(actor, f"{result.host}: {result.error}")
            return
        assert isinstance(result, Outcome)
        ledger.settle(result, now)
        del actor.calls[ref]
        if result.state == "computed":
            actor.num_units += 1
            actor.num_tokens += result.num_tokens
            actor.last_at = now
            self._num_died = 0
        elif result.state == "broken":  # perhaps its process is, too, as after an error of CUDA
            self._drop(actor, ledger, f"{result.error}", counts=False)

    def _lose(self, actor: _Actor, error: Exception, ledger: Ledger) -> None:
        """Note that an actor has died, or cannot be reached."""
        logger.debug(str(error))
        text = " ".join(str(error).split())
        is_error = isinstance(error, self._ray.exceptions.RayTaskError) or "creation task" in text
        if is_error and actor.start is not None:  # an error of Python, not a death
            last = str(error).strip().splitlines()[-1][:300]
            self._refuse(
                actor, f"{last}. Fix: see Ray's logs; each node needs the same packages installed"
            )
            return
        is_starting = actor.start is not None
        counts = not getattr(error, "preempted", False)
        _, _, cause = text.partition("The actor is dead because ")
        reason = (cause or text).partition(". ")[0][:200]
        where = f" on {actor.host}" if actor.host else ""
        self._drop(actor, ledger, reason, counts=counts, where=where)
        if is_starting and counts:
            self._num_died += 1
            if self._num_died >= max(_MOST_STARTS, len(self._actors) + 1):
                raise InputError(
                    f"backend: expected actors that load the base, got {self._num_died} that died: "
                    f"{reason}. Fix: see Ray's logs; perhaps more memory"
                )

    def _drop(
        self, actor: _Actor, ledger: Ledger, reason: str, *, counts: bool, where: str = ""
    ) -> None:
        """Part with an actor, and hand its units out again."""
        self._actors.remove(actor)
        self._ended.append(actor)
        self._look_at = 0.0  # another takes its slot at once
        self._ray.kill(actor.handle)  # where it is not dead after all
        if actor.token:
            self._on_death(actor.token)
        for unit in actor.calls.values():
            ledger.lose(unit, reason, time.monotonic(), counts=counts)
        lost = f"; {len(actor.calls)} units are handed out again" if actor.calls else ""
        logger.warning(f"actor {actor.number}{where} has ended: {reason}{lost}")
        actor.calls.clear()

    def _refuse(self, actor: _Actor, error: str) -> None:
        """Do without an actor that cannot load the base, and without its slot."""
        self._actors.remove(actor)
        self._ray.kill(actor.handle)
        self._num_refused += 1
        self._last_error = error
        logger.warning(f"actor {actor.number} does not take part: {error}")
        if not self._actors:
            raise InputError(error)

    def _end(self) -> None:
        """End all actors, and what they have claimed."""
        refs = [ref for actor in self._actors for ref in actor.calls]
        for actor in self._actors:
            self._ray.kill(actor.handle)
        if refs:
            self._ray.wait(refs, num_returns=len(refs), timeout=_END_S)
        for actor in self._actors:
            if actor.token:
                self._on_death(actor.token)

    def _speeds(self) -> str:
        ready = [each for each in self._actors if each.start is None]
        speeds = [each.tokens_per_second for each in ready if each.num_units]
        text = f"{len(ready)} of {len(self._actors)} actors"
        if not speeds:
            return f"{text} ready"
        low, high = f"{min(speeds):,.0f}", f"{max(speeds):,.0f}"
        return f"{text}, {low if low == high else f'{low} to {high}'} tokens/s each"

    def _pending_text(self, num: int) -> str:
        slot = self._slot
        gpus = f" and {slot.gpus} GPU" if slot.gpus else ""
        return (
            f"ray: expected an actor that has started, got {num} that wait: each needs {slot.cpus} "
            f"CPUs{gpus} free on a node. Fix: wait, if the nodes are slow; else --workers, "
            "--ray-cpus or more nodes"
        )
