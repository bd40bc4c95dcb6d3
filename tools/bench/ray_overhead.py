"""Time that Ray adds to a unit, with units that sleep in place of a base."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.samples import Sample
from carryon.cache.extraction.ray_actors.actor import Job as ActorJob
from carryon.cache.extraction.ray_actors.cluster import connected
from carryon.cache.extraction.ray_actors.dispatch import Actors
from carryon.cache.extraction.ray_actors.orders import Orders, Outcome
from carryon.cache.extraction.ray_actors.slots import Slot
from carryon.cache.extraction.sharing.claims import Claims
from carryon.cache.extraction.sharing.leases import Leases
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.receipt import units_with_receipt
from carryon.cache.format.zarr_metadata import receipt_path
from carryon.cache.settings import StoreSettings
from carryon.cache.store.shard_writer import UnitInputs
from carryon.tools.bench.job import Job
from carryon.tools.bench.scratch import plan_scratch

MS_TARGET = 20.0
_WIDTH, _UNIT_TOKENS = 16, 64


def measure_overhead(
    job: Job, *, units: int = 1000, sleep_s: float = 0.05, actors: int = 2
) -> None:
    """Report how much longer a unit takes than it sleeps, once all actors are at work.

    Each unit goes the whole way: it is ordered, claimed, its tokens are read, its states written,
    flushed and committed, and its figures come back.

    Args:
        job: input.
        units: of the store.
        sleep_s: of each, in place of passes of a base.
        actors: each with a CPU of its own, as far as Ray knows.
    """
    root = job.work / "store"
    plan_units(root, num_units=units)
    started_at = time.perf_counter()
    with connected("", num_cpus=actors) as ray:
        connected_s = time.perf_counter() - started_at
        crew = Actors(
            ray,
            {"root": str(root), "sleep_s": sleep_s},
            slot=Slot(cpus=1, gpus=0),
            workers=actors,
            open_job=open_sleeper,
            on_death=lambda _: None,
        )
        ledger = crew.compute(range(units), logging.getLogger(__name__).debug)
    assert not ledger.failed, ledger.failed
    times = sorted((root / receipt_path(unit)).stat().st_mtime for unit in units_with_receipt(root))
    assert len(times) == units
    per_unit_s = (times[-1] - times[0]) * actors / (units - actors)
    job.report(
        "ray.overhead",
        1000 * (per_unit_s - sleep_s),
        "ms a unit",
        at_most=MS_TARGET,
        units=units,
        actors=actors,
        sleep_s=sleep_s,
        connect_s=connected_s,
        seconds=time.perf_counter() - started_at,
        units_per_second=actors / per_unit_s,
    )


@contextmanager
def open_sleeper(job: ActorJob) -> Iterator[tuple[str, Callable[[int], Outcome]]]:
    """Do what an actor does with a job, but sleep in place of the base's passes."""
    root = Path(job["root"])
    manifest = read_manifest(root)
    inputs = UnitInputs(root, manifest)
    hidden = {tap: unit_states(manifest.unit_tokens) for tap in manifest.taps}
    with Leases(root) as leases, ThreadPoolExecutor(2) as threads:
        orders = Orders(Claims(root, manifest, leases))

        def run() -> None:
            with ThreadPoolExecutor(1) as writer:
                for unit in orders.iter_units([]):
                    unit_input = inputs.read(unit)
                    time.sleep(job["sleep_s"])
                    writer.submit(orders.write_unit, unit_input, hidden, elapsed_s=job["sleep_s"])

        threads.submit(orders.serve, run)
        yield leases.token, orders.extract
        orders.close()


def plan_units(root: Path, *, num_units: int) -> None:
    """Write the plan of a store of small units."""
    tokens = np.arange(_UNIT_TOKENS, dtype=np.int32)
    samples = [
        Sample(
            id=f"sample-{index}",
            tokens=tokens,
            loss_mask=np.ones(_UNIT_TOKENS, dtype=np.uint8),
            char_end=tokens,
            is_held_out=False,
        )
        for index in range(num_units)
    ]
    first: Mapping[str, NDArray[np.uint16]] = {"final": unit_states(_UNIT_TOKENS)}
    plan_scratch(
        root, samples, settings=StoreSettings(unit_tokens=_UNIT_TOKENS), first_states=first
    )


def unit_states(num_rows: int) -> NDArray[np.uint16]:
    """Return states of ones, [R, D] bits of bfloat16."""
    return np.full((num_rows, _WIDTH), 0x3F80, dtype=np.uint16)  # 1.0 in bfloat16
