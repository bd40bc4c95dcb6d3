"""Sums of the losses of the base and of several carry-ons over the batches of one pass."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.train.data.batch import Batch
from carryon.train.losses.base_states import BaseStates
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.endings import Endings
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.mixing.mixture import MixedCarryOn
from carryon.train.mixing.mixture_nll import MixtureSums
from carryon.train.trainer.held_out.job import EvalJob
from carryon.train.trainer.step import losses_of_delta, pair_delta

UNREAD_BATCHES = 64
"""Batches of an evaluation on an accelerator that are read at one time: the host goes ahead."""


@dataclass(slots=True)
class Losses:
    """Summed losses of one model."""

    total: float = 0.0
    by_sample: list[NDArray[np.float64]] = field(default_factory=list)
    """[B] for each batch."""
    endings: Endings | None = None
    """Gets the losses of each batch too."""
    unread: list[tuple[Tensor, NDArray[np.int64], Batch]] = field(default_factory=list)
    """Batches that are not counted yet: [M] losses on a device, rows and the batch on the host."""

    def add(self, losses_M: Tensor, rows_M: NDArray[np.int64], batch: Batch) -> None:
        """Count the losses of a batch; `rows_M` says which of its samples each belongs to.

        An accelerator is not waited for, except once for every UNREAD_BATCHES.
        """
        self.unread.append((losses_M.double(), rows_M, replace(batch.host, states={})))
        if losses_M.device.type == "cpu" or len(self.unread) == UNREAD_BATCHES:
            self.read()

    def read(self) -> None:
        """Count the batches that are not counted yet, by one copy from the device."""
        if not self.unread:
            return
        losses, rows, batches = zip(*self.unread, strict=True)
        self.unread = []
        values = torch.cat(losses).cpu() if len(losses) > 1 else losses[0].cpu()
        parts = torch.split(values, [len(each) for each in losses])
        for losses_M, rows_M, batch in zip(parts, rows, batches, strict=True):
            self.total += float(losses_M.sum())
            sums = np.bincount(rows_M, weights=losses_M.numpy(), minlength=len(batch.samples))
            self.by_sample.append(sums.astype(np.float64))
            if self.endings is not None:
                self.endings.add(losses_M.numpy(), batch)


@dataclass(slots=True)
class JobSums:
    """Sums of one job."""

    job: EvalJob
    losses: Losses
    mixture: MixtureSums | None
    num_bytes: int = 0
    """Of the targets; counted for a carry-on that only reads the states of other bases."""


@dataclass(slots=True)
class _HeadSums:
    """Losses of the base through one head, which the jobs with that head share."""

    head: FrozenHead
    chunk: int
    losses: Losses


class PassSums:
    """Sums of all jobs of a pass."""

    def __init__(
        self, jobs: Sequence[EvalJob], *, base: BaseStates | None, endings: Endings | None = None
    ) -> None:
        """Begin at 0.

        Args:
            jobs: to measure.
            base: reads the base's own states; None where no job needs them.
            endings: gets the base's losses too, through the first job's head that measures them.
        """
        self.targets = Losses()
        """How many, as losses of 1."""
        self.jobs = [
            JobSums(job, Losses(), MixtureSums(job.projected) if job.projected else None)
            for job in jobs
        ]
        self._base = base
        self._of_base: dict[tuple[int, int], _HeadSums] = {}
        for job in jobs:
            if job.with_base or (job.carryon is not None and not job.corrects):
                sums = _HeadSums(job.head, job.chunk, Losses())
                self._of_base.setdefault(_head_key(job), sums)
        for sums in [*self._of_base.values()][:1]:
            sums.losses.endings = endings

    def of_base(self, job: EvalJob) -> Losses | None:
        """Return the sums of the base through a job's head; None: not measured."""
        sums = self._of_base.get(_head_key(job))
        return None if sums is None else sums.losses

    def add(self, batch: Batch) -> None:
        """Count the losses of a batch, which is on the device of the heads."""
        rows = batch.rows_of_pairs()
        self.targets.add(torch.ones(len(rows)), rows, batch)
        of_base = self._add_base(batch, rows)
        deltas: dict[int, Tensor] = {}  # once for all alphas
        for sums in self.jobs:
            job = sums.job
            if job.token_bytes is not None:
                sums.num_bytes += int(job.token_bytes[batch.host.targets].sum())
            if job.carryon is None or not (job.corrects or job.mixes):
                continue
            found = _corrected(job, batch, deltas) if job.corrects else of_base[_head_key(job)]
            if sums.mixture is not None and self._base is not None:
                found = _mix(job, found, batch, base=self._base, sums=sums.mixture)
            sums.losses.add(found, rows, batch)

    def read(self) -> None:
        """Count the batches that are still on the device."""
        of_base = [sums.losses for sums in self._of_base.values()]
        for losses in (*of_base, *(sums.losses for sums in self.jobs)):
            losses.read()

    def _add_base(self, batch: Batch, rows_M: NDArray[np.int64]) -> dict[tuple[int, int], Tensor]:
        """Count the base's losses through each head, and return them, [M]."""
        found = {}
        for key, sums in self._of_base.items():
            assert self._base is not None
            states = self._base.at_pairs(batch, sums.head)
            found[key] = token_losses(states, batch.targets, head=sums.head, chunk=sums.chunk)
            sums.losses.add(found[key], rows_M, batch)
        return found


def _head_key(job: EvalJob) -> tuple[int, int]:
    return id(job.head), job.chunk


def _corrected(job: EvalJob, batch: Batch, deltas: dict[int, Tensor]) -> Tensor:
    """Return the losses with the carry-on, [M]; its correction is kept in `deltas`."""
    assert job.carryon is not None
    key = id(job.carryon)
    if key not in deltas:
        deltas[key] = pair_delta(job.carryon, batch, head=job.head)
    return losses_of_delta(
        job.carryon, deltas[key], batch, head=job.head, chunk=job.chunk, alpha=job.alpha
    )


def _mix(
    job: EvalJob, losses_M: Tensor, batch: Batch, *, base: BaseStates, sums: MixtureSums
) -> Tensor:
    """Return the losses of a mixture, [M], and count them and those of its parts."""
    assert isinstance(job.carryon, MixedCarryOn)
    assert job.projected is not None
    pairs = job.projected.at_pairs(batch, device=losses_M.device)
    mixed = job.carryon.mix(losses_M, base.at_pairs(batch, job.head), pairs)
    sums.add(losses_M, mixed, pairs, batch.host.targets)
    return mixed.losses
