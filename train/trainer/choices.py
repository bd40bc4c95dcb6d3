"""What a run chooses for the machine on which it begins, and keeps on every other."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from carryon.cache.device import HEAD_DTYPES, pick_device, pick_head_dtype
from carryon.cache.store.view import StoreLike
from carryon.train.config import LossSettings
from carryon.train.losses.calibration import calibrate
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.sampled_softmax import place_training_head
from carryon.train.losses.ways import WAYS
from carryon.train.trainer.distributed import Processes, sum_over_processes
from carryon.train.trainer.run import Job
from carryon.train.trainer.run_dir import saved_choices, saved_evaluate_tokens

logger = logging.getLogger(__name__)


def keep_evaluated(job: Job) -> Job:
    """Return a job that chooses what to evaluate with the number that its run began with."""
    if job.settings.run.evaluate_tokens:
        return job
    number = saved_evaluate_tokens(job.out)
    return replace(job, settings=job.settings.with_options(evaluate_tokens=number))


def choose_products(
    jobs: Sequence[Job],
    store: StoreLike,
    heads: dict[LossSettings, FrozenHead],
    processes: Processes,
) -> list[Job]:
    """Return the jobs with a dtype of products and a way of the loss each; nothing is written.

    A run keeps what it began with, so that its bits stay, also on another machine.

    Args:
        jobs: with resolved settings, on one device.
        store: with the head.
        heads: those that are placed to be timed are added, by the settings that they end with.
        processes: that train together; the first one measures.

    Raises:
        InputError: the run in the folder of a job has a choice that does not exist.
    """
    chosen: dict[LossSettings, str] = {}
    resolved = []
    for job in jobs:
        saved = saved_choices(job.out)
        if job.settings.loss.head_dtype == "auto":
            dtype = saved.get("head_dtype") or _measure_head_dtype(job, processes)
            job = replace(job, settings=job.settings.with_options(head_dtype=dtype))
        loss = job.settings.loss
        if loss.loss_way == "auto":
            way = saved.get("loss_way") or chosen.get(loss)
            if not way:
                way = chosen[loss] = _measure_loss_way(job, store, heads, processes)
            job = replace(job, settings=job.settings.with_options(loss_way=way))
        resolved.append(job)
    return resolved


def _measure_head_dtype(job: Job, processes: Processes) -> str:
    device = pick_device(job.settings.run.device)
    dtype = str(pick_head_dtype("auto", device)).removeprefix("torch.")
    return _of_first(HEAD_DTYPES, dtype, processes, device)


def _measure_loss_way(
    job: Job, store: StoreLike, heads: dict[LossSettings, FrozenHead], processes: Processes
) -> str:
    loss, optimization = job.settings.loss, job.settings.optimization
    head = place_training_head(store, loss, device=pick_device(job.settings.run.device))
    way = next(iter(WAYS))
    if processes.is_first:
        measured = calibrate(
            head,
            positions=optimization.micro_batch_tokens or optimization.tokens_per_step,
            chunk_tokens=loss.chunk_tokens,
        )
        if measured is not None:
            way = measured.way
            logger.info(str(measured))
    way = _of_first(list(WAYS), way, processes, head.device)
    heads[job.settings.with_options(loss_way=way).loss] = replace(head, way=way)
    return way


def _of_first(names: Sequence[str], name: str, processes: Processes, device: torch.device) -> str:
    """Return the name, one of `names`, that the first process has chosen."""
    [index] = sum_over_processes(names.index(name) if processes.is_first else 0, device=device)
    return names[int(index)]
