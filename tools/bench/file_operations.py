"""What a worker asks of a file system for each unit that it claims, writes and commits."""

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from carryon.cache.extraction.sharing.claims import Claims
from carryon.cache.extraction.sharing.leases import Leases
from carryon.cache.format.manifest import read_manifest
from carryon.cache.store.shard_writer import UnitInputs
from carryon.tools.bench.job import Job, run_fresh
from carryon.tools.bench.ray_overhead import plan_units, unit_states

_KINDS = {
    "stat": "looks",
    "lstat": "looks",
    "fstat": "looks",
    "listdir": "looks",
    "scandir": "looks",
    "rename": "names",
    "replace": "names",
    "link": "names",
    "unlink": "names",
    "mkdir": "names",
    "rmdir": "names",
    "fsync": "flushes",
    "utime": "touches",
}
"""Function of `os` -> how it is counted."""
_MEASURE = """
import json, sys
from pathlib import Path
from carryon.tools.bench.file_operations import count_of_units
print(json.dumps(count_of_units(Path(sys.argv[1]))))
"""


def measure_file_operations(job: Job, *, units: int = 50) -> None:
    """Report the file operations of a worker for a unit of one tap, with nobody beside it.

    Args:
        job: input.
        units: of the store; the mean counts.
    """
    root = job.work / "store"
    plan_units(root, num_units=units)
    found = run_fresh(_MEASURE, str(root))
    job.report(
        "operations.unit", sum(found.values()), "file operations a unit", units=units, **found
    )


def count_of_units(root: Path) -> dict[str, float]:
    """Write and commit all units of a planned store; return the operations a unit, by kind."""
    manifest = read_manifest(root)
    inputs = UnitInputs(root, manifest)
    hidden = {tap: unit_states(manifest.unit_tokens) for tap in manifest.taps}
    with Leases(root) as leases:
        claims = Claims(root, manifest, leases)
        with _counted() as counts:
            for unit in claims.iter_units(range(manifest.num_units)):
                claims.write_unit(inputs.read(unit), hidden, elapsed_s=0.0)
    return {kind: round(count / manifest.num_units, 2) for kind, count in sorted(counts.items())}


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Yield a count of what this process, all of its threads, asks; in a process of its own."""
    counts: Counter[str] = Counter()
    guard, is_over = threading.RLock(), threading.Event()

    def count(kind: str) -> None:
        with guard:
            counts[kind] += not is_over.is_set()

    def counting(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:  # noqa: ANN401
            count(kind)
            return function(*given, **named)

        return call

    sys.addaudithook(lambda event, _: count("opens") if event == "open" else None)
    before = {name: getattr(os, name) for name in _KINDS}
    for name, function in before.items():
        setattr(os, name, counting(_KINDS[name], function))
    try:
        yield counts
    finally:
        is_over.set()
        for name, function in before.items():
            setattr(os, name, function)
