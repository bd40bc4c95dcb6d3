"""Whether the steps of a run are compiled, and for which sizes: chosen when it begins, then kept.

Padded and compiled, a step is the same up to rounding, so the last bits depend on both.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from carryon.cache.device import pick_device
from carryon.cache.errors import InputError
from carryon.train.config import MemorySettings, OptimizationSettings
from carryon.train.data.contamination import Contamination
from carryon.train.data.datasets import TrainData
from carryon.train.data.padding import PaddedSize, choose_sizes, rounded_up
from carryon.train.data.sampler import rank_rows
from carryon.train.kinds import get_kind
from carryon.train.trainer.distributed import Processes, sum_over_processes
from carryon.train.trainer.run import Job
from carryon.train.trainer.run_dir import saved_compilation


def choose_compilation(
    jobs: Sequence[Job], data: TrainData, contamination: Contamination, processes: Processes
) -> list[Job]:
    """Return the jobs with `compile` true or false, and with sizes if true; nothing is written.

    Args:
        jobs: with resolved settings, on one device.
        data: to train on.
        contamination: of its halves, which counts the targets.
        processes: that train together; the first one decides.

    Raises:
        InputError: a run is to be compiled that cannot be, a size is none or larger than a batch,
            or the run in the folder of a job has a choice that does not exist.
    """
    return [_choose(job, data, contamination, processes) for job in jobs]


def _choose(job: Job, data: TrainData, contamination: Contamination, processes: Processes) -> Job:
    given, problem = job.settings.compilation, _obstacle(job)
    is_compiled, sizes = given.compile, list(given.padded_sizes)
    saved = saved_compilation(job.out)
    if is_compiled == "auto":
        own = saved is not None and saved.compile is True
        [is_first] = sum_over_processes(
            own and processes.is_first, device=pick_device(job.settings.run.device)
        )
        is_compiled = bool(is_first)
    if is_compiled and problem:
        raise InputError(f"compile: expected {problem}. Fix: leave out --compile")
    if not is_compiled:
        sizes = []
    elif not sizes:
        sizes = list(saved.padded_sizes) if saved is not None else []
        sizes = sizes or [str(each) for each in _sizes(job, data, contamination, processes)]
    _check_sizes(sizes, data, optimization=job.settings.optimization)
    changed = replace(given, compile=is_compiled, padded_sizes=sizes)
    return replace(job, settings=replace(job.settings, compilation=changed))


def _check_sizes(
    sizes: Sequence[str], data: TrainData, *, optimization: OptimizationSettings
) -> None:
    """Refuse sizes that no batch has: each is tried before the first step, and takes memory.

    Raises:
        InputError: a size is none, or has more tokens or rows than a step can have.
    """
    longest = int(data.store.sample_lengths.max(initial=0))
    # Of a step: a resumed run may have other micro-batches than when its sizes were chosen.
    most = rounded_up(max(longest, optimization.tokens_per_step))
    for size in map(PaddedSize.parse, sizes):
        if max(size.tokens, size.rows) > most:
            raise InputError(
                f"padded_sizes: expected at most {most:,} tokens and rows, those of a step, got "
                f"{size}. Fix: leave it out, and sizes are chosen"
            )


def lengths_of_batches(
    job: Job, data: TrainData, processes: Processes
) -> Iterator[NDArray[np.int64]]:
    """Yield the lengths [B] of the samples of each batch of a run, in every process."""
    lengths = data.store.sample_lengths
    for windows in data.plan(job.settings.optimization):
        for batch in (batch for window in windows for step in window.steps for batch in step):
            for rank in range(processes.size):
                rows = rank_rows(batch, rank=rank, world_size=processes.size)
                yield lengths[rows].astype(np.int64)


def _obstacle(job: Job) -> str:
    """Return what a run would need to be compiled, and what it has; empty if it can be."""
    settings = job.settings
    kind = settings.carryon.kind
    if job.module is not None or not get_kind(kind).compiles:
        return f"false for the kind {kind}, got true"
    if settings.carryon.dropout > 0:
        return (
            f"false with dropout, whose random numbers are others, got {settings.carryon.dropout}"
        )
    if settings.memory != MemorySettings():
        return "false with settings that save memory, of which compiled steps need more, got true"
    return ""


def _sizes(
    job: Job, data: TrainData, contamination: Contamination, processes: Processes
) -> tuple[PaddedSize, ...]:
    optimization = job.settings.optimization
    tokens = int(data.store.sample_lengths[data.split.train].sum())
    return choose_sizes(
        lengths_of_batches(job, data, processes),
        most_tokens=optimization.micro_batch_tokens or optimization.tokens_per_step,
        density=contamination.train_targets / max(1, tokens),
    )
