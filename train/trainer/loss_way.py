"""The way of the loss of a run: chosen by timing when it begins, kept when it is resumed."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from carryon.cache.device import pick_device
from carryon.cache.errors import InputError
from carryon.cache.store.view import StoreLike
from carryon.train.config import LossSettings
from carryon.train.losses.calibration import calibrate
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.sampled_softmax import place_training_head
from carryon.train.losses.ways import WAYS
from carryon.train.trainer.distributed import Processes, sum_over_processes
from carryon.train.trainer.run import Job
from carryon.train.trainer.run_dir import saved_loss_way

logger = logging.getLogger(__name__)


def choose_loss_ways(
    jobs: Sequence[Job],
    store: StoreLike,
    heads: dict[LossSettings, FrozenHead],
    processes: Processes,
) -> list[Job]:
    """Return the jobs with a way of the loss each; nothing is written.

    Args:
        jobs: with resolved settings, on one device.
        store: with the head.
        heads: those that are placed to be timed are added, by the settings that they end with.
        processes: that train together; the first one measures.

    Raises:
        InputError: the run in the folder of a job has a way that does not exist.
    """
    chosen: dict[LossSettings, str] = {}
    resolved = []
    for job in jobs:
        loss = job.settings.loss
        if loss.loss_way == "auto":
            way = saved_loss_way(job.out)
            if way and way not in WAYS:
                raise InputError(
                    f"{job.out}: expected a run whose loss_way is one of {', '.join(WAYS)}, got "
                    f"{way!r}. Fix: give another --out"
                )
            if not way:
                chosen.setdefault(loss, "")
                way = chosen[loss] = chosen[loss] or _measure(job, store, heads, processes)
            job = replace(job, settings=job.settings.with_options(loss_way=way))
        resolved.append(job)
    return resolved


def _measure(
    job: Job, store: StoreLike, heads: dict[LossSettings, FrozenHead], processes: Processes
) -> str:
    loss, optimization = job.settings.loss, job.settings.optimization
    head = place_training_head(store, loss, device=pick_device(job.settings.run.device))
    names = list(WAYS)
    way = names[0]
    if processes.is_first:
        measured = calibrate(
            head,
            positions=optimization.micro_batch_tokens or optimization.tokens_per_step,
            chunk_tokens=loss.chunk_tokens,
        )
        if measured is not None:
            way = measured.way
            logger.info(str(measured))
    [index] = sum_over_processes(names.index(way) if processes.is_first else 0, device=head.device)
    way = names[int(index)]
    heads[job.settings.with_options(loss_way=way).loss] = replace(head, way=way)
    return way
