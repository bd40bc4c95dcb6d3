"""The missing units of a store, computed by actors of Ray."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from carryon.cache.base.model import Base
from carryon.cache.errors import DiskFullError, UnfinishedStoreError
from carryon.cache.extraction.ray_actors.actor import Job, open_store_job
from carryon.cache.extraction.ray_actors.cluster import connected, nodes_of
from carryon.cache.extraction.ray_actors.dispatch import Actors
from carryon.cache.extraction.ray_actors.ledger import Ledger
from carryon.cache.extraction.ray_actors.slots import plan_slot
from carryon.cache.extraction.sharing.leases import Leases
from carryon.cache.settings import DEVICE_MAPS, RaySettings

logger = logging.getLogger(__name__)


def compute_in_ray(
    units: Sequence[int],
    *,
    base: Base,
    job_of: Callable[..., Job],
    leases: Leases,
    note: Callable[[str], None],
    settings: RaySettings,
    workers: int,
) -> None:
    """Have actors compute and commit units, as far as they can; this process computes none.

    Args:
        units: without a receipt.
        base: of this process.
        job_of: returns the job of an actor, given `num_threads`.
        leases: of this process on the store.
        note: is told of the actors' speed.
        settings: of Ray.
        workers: actors; 0: as many as there is room for.

    Raises:
        InputError: there is no cluster, or none of its nodes can compute.
        UnfinishedStoreError: some units failed; each was named in the log.
        DiskFullError: an actor had no space left.
    """
    workers = min(workers, len(units))
    num_cpus = max(torch.get_num_threads(), workers)
    with _moved_away(base), connected(settings.ray_address, num_cpus=num_cpus) as ray:
        device = job_of(num_threads=1)["forward"]["device"]
        slot = plan_slot(
            nodes_of(ray),
            device=device,
            workers=workers,
            cpus=settings.ray_cpus,
            gpus=settings.ray_gpus,
        )
        job = with_whole_paths(job_of(num_threads=slot.cpus))
        actors = Actors(
            ray,
            job,
            slot=slot,
            workers=workers,
            open_job=open_store_job,
            on_death=lambda token: leases.mark_ended({token}),
        )
        ledger = actors.compute(units, note)
    for line in actors.report():
        logger.info(line)
    _refuse_failures(ledger, store=job["root"])


def with_whole_paths(job: Job) -> Job:
    """Return a job for an actor, which may start in another folder."""
    forward, base = job["forward"], Path(job["base"])
    named = {name: forward.get(name, "") for name in ("device_map", "offload_folder")}
    paths = {
        name: str(Path(path).absolute())
        for name, path in named.items()
        if path and path not in DEVICE_MAPS
    }
    return job | {
        "base": str(base.absolute()) if base.exists() else job["base"],
        "forward": forward | paths,
    }


def _refuse_failures(ledger: Ledger, *, store: str) -> None:
    for unit, reason in sorted(ledger.failed.items()):
        logger.warning(f"unit {unit} failed: {reason}")
    if ledger.stopped is not None and ledger.stopped.state == "full":
        raise DiskFullError(ledger.stopped.error)
    if ledger.failed:
        raise UnfinishedStoreError(
            f"{store}: expected all units computed, got {len(ledger.failed)} that failed: see the "
            "lines above. Fix: run the same command to try them again"
        )


@contextmanager
def _moved_away(base: Base) -> Iterator[None]:
    """Keep a base in the memory of the host, where actors need that of its device.

    One that is quantized, or spread over devices, cannot be moved.
    """
    places = set((getattr(base.model, "hf_device_map", None) or {}).values())
    is_plain = len(places) <= 1 and not getattr(base.model, "is_quantized", False)
    is_moved = base.device.type != "cpu" and is_plain
    if is_moved:
        base.model.to("cpu")  # type: ignore[arg-type]  # annotated for the method of a tensor
        torch.accelerator.empty_cache()
    try:
        yield
    finally:
        if is_moved:
            base.model.to(base.device)  # type: ignore[arg-type]
