"""An actor: a process that Ray starts on some node, loads the base once, and computes units.

Runs wherever Ray puts it; all that it needs is the job, and the folder of the store at the same
path. Ray is not imported here.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from carryon.cache.errors import CarryOnError
from carryon.cache.extraction.ray_actors.orders import Orders, Outcome

logger = logging.getLogger(__name__)

Job = dict[str, Any]
Open = Callable[[Job], AbstractContextManager[tuple[str, Callable[[int], Outcome]]]]
"""Yields the token of the process's leases and what computes a unit, called from any thread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """What an actor says when it has loaded the base, or that it cannot."""

    host: str
    token: str = ""
    """Of its leases."""
    error: str = ""
    """Empty: it is ready."""


class UnitActor:
    """Computes the units that it is told, as an actor of Ray with several threads."""

    def __init__(self, open_job: Open) -> None:
        """Prepare; nothing is loaded yet, so that an error can be told in one line."""
        self._open_job, self._stack = open_job, ExitStack()
        self._extract: Callable[[int], Outcome] | None = None

    def start(self, job: Job) -> Started:
        """Load the base of the job, as of `worker.opened_store`."""
        host = socket.gethostname()
        try:
            token, self._extract = self._stack.enter_context(self._open_job(job))
        except CarryOnError as error:
            return Started(host=host, error=" ".join(str(error).split()))
        return Started(host=host, token=token)

    def extract(self, unit: int) -> Outcome:
        """Compute and commit a unit, and say what became of it."""
        assert self._extract is not None
        return self._extract(unit)


@contextmanager
def open_store_job(job: Job) -> Iterator[tuple[str, Callable[[int], Outcome]]]:
    """Open the store and the base of a job, and start the pipeline in a thread."""
    from pathlib import Path

    from carryon.cache.device import device_of
    from carryon.cache.extraction.forward import run_units
    from carryon.cache.extraction.sharing.worker import opened_store

    forward = job["forward"]
    if not forward.get("device_map"):  # of the accelerators, Ray lets an actor see only its own
        forward = forward | {"device": device_of(forward["device"], 0)}
    with opened_store(job | {"forward": forward}) as (manifest, base, claims):
        orders = Orders(claims)

        def run() -> None:
            run_units(
                Path(job["root"]),
                manifest,
                base,
                batch_tokens=forward["batch_tokens"],
                max_disk_bytes=job["max_disk_bytes"],
                units=[],
                claims=orders,
                num_encoders=job["num_threads"],
            )

        def serve() -> None:
            try:
                orders.serve(run)
            except BaseException:
                logger.exception("the pipeline has ended")
                os._exit(1)  # else units would be waited for for ever

        thread = threading.Thread(target=serve, name="pipeline", daemon=True)
        thread.start()
        try:
            yield claims.token, orders.extract
        finally:
            orders.close()
            thread.join()
