"""Jobs for actors of Ray in tests: units that need no base, and one that ends its process."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from carryon.cache.errors import MissingError
from carryon.cache.extraction.ray_actors.actor import Job
from carryon.cache.extraction.ray_actors.orders import Outcome


@contextmanager
def open_sleeper(job: Job) -> Iterator[tuple[str, Callable[[int], Outcome]]]:
    """Sleep for each unit; kill the process at those of the job that are deadly.

    The job's `broken` are units that only the first process fails at. The first
    `fatal_starts` processes die as they start; without `base` an actor cannot start. With
    `together` none starts before that number of them is there.
    """
    for number in range(job.get("fatal_starts", 0)):
        with suppress(FileExistsError):
            os.mkdir(f"{job['folder']}/start-{number}")
            os.kill(os.getpid(), signal.SIGKILL)
    if "base" not in job:
        raise MissingError("base: expected a folder, got nothing.\nFix: another")
    broken = set(job.get("broken", []))
    os.makedirs(f"{job['folder']}/processes/{os.getpid()}")
    while len(os.listdir(f"{job['folder']}/processes")) < job.get("together", 0):
        time.sleep(0.01)

    def extract(unit: int) -> Outcome:
        if unit in job.get("deadly", []):
            os.kill(os.getpid(), signal.SIGKILL)
        marker = f"{job['folder']}/{unit}"
        if unit in broken and not os.path.exists(marker):
            os.mkdir(marker)
            return Outcome(unit=unit, state="broken", error="RuntimeError: CUDA error")
        time.sleep(job["sleep_s"])
        return Outcome(unit=unit, state="computed", num_tokens=10, elapsed_s=job["sleep_s"])

    yield str(os.getpid()), extract
