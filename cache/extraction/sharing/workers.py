"""Extraction by several processes: started here, by `torchrun`, by Ray, or by the same command
elsewhere.

The first one writes the plan; each of the others compares its own with it, whole, by name. Then
all claim units until each has a receipt, and remove what killed ones have left.
"""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from carryon.cache.base.model import Base
from carryon.cache.base.recorded import recorded_forward
from carryon.cache.device import count_cores, device_of
from carryon.cache.errors import InputError, StoreBusyError
from carryon.cache.extraction.forward import run_units, units_to_do
from carryon.cache.extraction.ray_actors.computing import compute_in_ray
from carryon.cache.extraction.report import ExtractReport, summarize
from carryon.cache.extraction.sharing.claims import PLAN, Claims, clear_leftovers
from carryon.cache.extraction.sharing.leases import Leases, LeaseTimes
from carryon.cache.extraction.stages.items import StatesOf
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.receipt import has_receipt, read_receipt, units_with_receipt
from carryon.cache.lock import write_lock
from carryon.cache.optional import require
from carryon.cache.progress import Progress
from carryon.cache.settings import ForwardSettings, RaySettings
from carryon.cache.store.shard_writer import UnitInputs

logger = logging.getLogger(__name__)

_PLAN_LOOK_S, _LOOK_S = 0.2, 1.0
_STOP_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharing:
    """How an extraction shares a store with other processes."""

    workers: int
    """Processes on this machine, this one counted."""
    forward: ForwardSettings
    """Of each of them; devices are dealt out."""
    times: LeaseTimes = LeaseTimes()
    ray: RaySettings | None = None
    """Let actors of Ray compute, `workers` of them or 0 for as many as there is room for, and not
    this process."""


def check_backend(backend: str, ray: RaySettings, *, others: Collection[str] = ()) -> bool:
    """Return whether actors of Ray compute.

    Args:
        backend: asked for.
        ray: options of Ray.
        others: backends that the caller has, besides transformers and ray.

    Raises:
        InputError: there is no such backend, or options of Ray are given for another.
    """
    if backend not in (known := ("transformers", "ray", *others)):
        raise InputError(
            f"backend: expected one of {', '.join(known)}, got {backend!r}. Fix: --backend ray"
        )
    if backend != "ray" and ray != RaySettings():
        raise InputError(
            f"ray_address, ray_cpus, ray_gpus: expected --backend ray beside them, got {backend}. "
            "Fix: --backend ray"
        )
    return backend == "ray"


def plan_sharing(
    workers: int, forward: ForwardSettings, *, ray: RaySettings | None = None
) -> tuple[Sharing | None, ForwardSettings]:
    """Return how to share a store, None for alone, and the settings of this process's base.

    Args:
        workers: processes on this machine; 0: this one alone, unless `torchrun` started several.
        forward: settings of all of them.
        ray: as of Sharing.

    Raises:
        InputError: `workers` is below 0, or `torchrun` started the processes already.
    """
    if workers < 0:
        raise InputError(f"workers: expected 0 or more, got {workers}. Fix: --workers 2")
    is_launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if ray is not None:
        if is_launched:
            raise InputError(
                "backend: expected no ray under torchrun, which starts the processes, got ray. "
                "Fix: leave out torchrun"
            )
        require("ray", extra="ray", purpose="--backend ray")  # before the base is loaded
        return Sharing(workers=workers, forward=forward, ray=ray), forward
    if forward.device_map and (is_launched or workers > 1):
        raise InputError(
            "device_map: expected one process, which spreads the base over all devices, got "
            "several. Fix: leave out --workers and torchrun, or --device-map"
        )
    if is_launched:
        if workers > 1:
            raise InputError(
                f"workers: expected none under torchrun, which starts the processes, got {workers}."
                " Fix: leave out --workers"
            )
        rank = int(os.environ.get("LOCAL_RANK", "0"))
        own = replace(forward, device=device_of(forward.device, rank))
        return Sharing(workers=1, forward=own), own
    if not workers:
        return None, forward
    own = replace(forward, device=device_of(forward.device, 0)) if workers > 1 else forward
    return Sharing(workers=workers, forward=forward), own


def run_together(
    root: Path,
    prepare: Callable[[], tuple[Manifest, Base]],
    *,
    sharing: Sharing,
    batch_tokens: int,
    max_disk_bytes: int | None,
    states_of: StatesOf | None = None,
) -> ExtractReport:
    """Extract with other processes until the store is complete, and report what all have written.

    Args:
        root: of the store.
        prepare: writes the plan, or checks that the plan written is the same; returns it, and the
            base of this process.
        sharing: how many processes to start here.
        batch_tokens: tokens in one forward pass.
        max_disk_bytes: as of `run_units`.
        states_of: as of `run_units`, in this process; not with Ray.

    Raises:
        UnfinishedStoreError: with Ray, some units failed; each was named in the log.
    """
    with write_lock(root, is_shared=True), Leases(root, sharing.times) as leases:
        manifest, base = _alone(leases, prepare)
        todo = units_to_do(root, manifest)
        started_at = time.perf_counter()
        job = _Job(
            root=root,
            manifest=manifest,
            base=base,
            forward=replace(sharing.forward, batch_tokens=batch_tokens),
            max_disk_bytes=max_disk_bytes,
            times=sharing.times,
        )
        with _Shown(root, manifest, todo) as shown:
            own: ExtractReport | None = None
            if sharing.ray is None:
                own = _compute_here(job, todo, leases, sharing.workers, states_of)
            elif todo:
                compute_in_ray(
                    todo,
                    base=base,
                    job_of=partial(job.to_dict, 0, device=job.forward.device),
                    leases=leases,
                    note=shown.note,
                    settings=sharing.ray,
                    workers=sharing.workers,
                )
        report = _finish(job, todo, leases, elapsed_s=time.perf_counter() - started_at)
        return replace(report, limit=own.limit, stage_s=own.stage_s) if own else report


def _compute_here(
    job: "_Job", todo: list[int], leases: Leases, workers: int, states_of: StatesOf | None
) -> ExtractReport:
    """Compute units in this process and in others that it starts; return the report of this one."""
    with (
        _divided_threads(workers) as num_threads,
        _Workers(job, num_threads, min(workers, len(todo)) - 1) as others,
    ):
        report = run_units(
            job.root,
            job.manifest,
            job.base,
            batch_tokens=job.forward.batch_tokens,
            max_disk_bytes=job.max_disk_bytes,
            units=todo,
            claims=Claims(job.root, job.manifest, leases),
            states_of=states_of,
            num_encoders=max(1, count_cores() // workers),
        )
        is_complete = units_with_receipt(job.root).issuperset(todo)
        others.wait(timeout_s=2 * _LOOK_S if is_complete else None)
    return report


def _finish(job: "_Job", todo: list[int], leases: Leases, *, elapsed_s: float) -> ExtractReport:
    """Report what all have written, and remove what killed ones have left if that is all."""
    done = [unit for unit in todo if has_receipt(job.root, job.manifest, unit)]
    is_finished = len(done) == len(todo)
    if is_finished:
        clear_leftovers(job.root, job.manifest, leases)
    receipts = [read_receipt(job.root, job.manifest, unit) for unit in done]
    return summarize(job.root, job.manifest, receipts, elapsed_s=elapsed_s, is_finished=is_finished)


def _alone(leases: Leases, prepare: Callable[[], tuple[Manifest, Base]]) -> tuple[Manifest, Base]:
    """Call `prepare` while no other process that shares the store does."""
    while True:
        while not leases.take(PLAN):
            time.sleep(_PLAN_LOOK_S)
        try:
            return prepare()
        except StoreBusyError as error:  # it was paused for long: the plan of the other is taken
            logger.info(str(error))
        finally:
            leases.release(PLAN)
        time.sleep(_PLAN_LOOK_S)


@contextmanager
def _divided_threads(workers: int) -> Iterator[int]:
    """Let torch use its share of the cores, and yield how many threads that are."""
    before = torch.get_num_threads()
    share = max(1, before // workers)
    torch.set_num_threads(share)
    try:
        yield share
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What the other processes on this machine need."""

    root: Path
    manifest: Manifest
    base: Base
    forward: ForwardSettings
    max_disk_bytes: int | None
    times: LeaseTimes

    def to_dict(self, number: int, *, num_threads: int, device: str) -> dict[str, Any]:
        """Return plain values for the process of a number, from 1 on."""
        names = {"compute_dtype", "attention"} & self.manifest.forward.keys()  # not in an old one
        how = {name: self.manifest.forward[name] for name in names}
        forward = recorded_forward(self.forward, self.manifest.base)
        forward = replace(forward, device=device, **how)
        return {
            "number": number,
            "root": str(self.root.absolute()),
            "fingerprint": self.manifest.fingerprint,
            "base": self.base.source,
            "forward": forward.to_dict(),
            "max_disk_bytes": self.max_disk_bytes,
            "num_threads": num_threads,
            "times": [self.times.heartbeat_s, self.times.expiry_s],
        }


class _Workers:
    """Other processes on this machine, as a context manager that ends them.

    Each ends by itself when all units have a receipt, and when this process ends in any way: it
    notices that the pipe to its standard input is closed.
    """

    def __init__(self, job: _Job, num_threads: int, num: int) -> None:
        self._job, self._num_threads, self._num = job, num_threads, max(0, num)
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self._num_threads),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # scripts change it
            "TQDM_DISABLE": "1",  # one bar, that of this process
        }
        try:
            for number in range(1, self._num + 1):
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "carryon.cache.extraction.sharing.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # Ctrl-C ends this process, which ends the others
                )
                self._processes.append(process)
                assert process.stdin is not None
                job = self._job.to_dict(
                    number,
                    num_threads=self._num_threads,
                    device=device_of(self._job.forward.device, number),
                )
                with suppress(BrokenPipeError):  # it is dead already: `wait` warns of it
                    process.stdin.write(json.dumps(job).encode() + b"\n")
                    process.stdin.flush()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def wait(self, *, timeout_s: float | None) -> None:
        """Wait for processes that are still at work, and warn of each that was ended."""
        for number, process in enumerate(self._processes, start=1):
            with suppress(subprocess.TimeoutExpired):  # it still loads the base
                process.wait(timeout=timeout_s)
            if process.returncode:
                how = f"signal {-process.returncode}" if process.returncode < 0 else "an error"
                logger.warning(f"worker {number + 1} was ended by {how}: others took over")

    def _stop(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
        end_at = time.monotonic() + _STOP_S
        for process in self._processes:
            try:
                process.wait(timeout=max(0.0, end_at - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _Shown:
    """One bar over the units of all processes, read from receipts, as a context manager."""

    def __init__(self, root: Path, manifest: Manifest, todo: list[int]) -> None:
        inputs = UnitInputs(root, manifest)
        self._root = root
        self._tokens = {unit: inputs.num_tokens(unit) for unit in todo}
        self._note = ""
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def note(self, text: str) -> None:
        """Say something behind the counts."""
        self._note = text

    def _show(self) -> None:
        left = dict(self._tokens)
        with Progress(sum(left.values()), name="extract", unit="tokens") as progress:
            is_over, pause_s = False, _LOOK_S
            while left and not is_over:
                is_over = self._is_over.wait(pause_s)
                started_at = time.perf_counter()
                done = units_with_receipt(self._root) & left.keys()
                # A million names take a second: a tenth of the time goes into looking.
                pause_s = max(_LOOK_S, 10 * (time.perf_counter() - started_at))
                progress.note = self._note
                progress.update(sum(left.pop(unit) for unit in done))
