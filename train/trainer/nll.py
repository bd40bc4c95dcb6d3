"""Held-out loss of the base and of several carry-ons, measured in one pass over a store."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carryon.cache.errors import InputError
from carryon.cache.progress import track
from carryon.cache.store.view import StoreLike
from carryon.train.config import StreamSettings
from carryon.train.data.batch import Batch
from carryon.train.data.loader import Stream
from carryon.train.data.sampler import count_steps, plan_pass, rank_rows
from carryon.train.data.split import sample_units
from carryon.train.losses.base_states import BaseStates, get_base_states
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.endings import Endings
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.mixing.mixture import MixedCarryOn
from carryon.train.mixing.mixture_nll import MixtureNll, MixtureSums, by_state
from carryon.train.mixing.projected import ProjectedSources
from carryon.train.modules.carryon import CarryOn, taps_of
from carryon.train.trainer.distributed import current_processes, sum_over_processes
from carryon.train.trainer.step import losses_of_delta, pair_delta

logger = logging.getLogger(__name__)

BATCH_TOKENS = 4096
"""Maximum tokens of an evaluation's batch."""
BATCH_BYTES = 20 << 20
"""Maximum bytes of a batch's states at one tap: evaluating a wide base then needs no more memory
than training."""
FEW_TARGETS = 2000
"""Held-out targets below which a loss draws a warning."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nll:
    """Mean negative log-likelihood of the targets of some samples, in nats, and standard errors.

    Losses within a sample are correlated, so standard errors are clustered by sample. With n_s
    the targets of sample s, L_s the sum of their losses, m = sum(L_s) / sum(n_s) the mean, and S
    the samples that have targets:

        se = sqrt(S / (S - 1) * sum((L_s - m * n_s) ** 2)) / sum(n_s)

    the error of a ratio estimator (Cochran, Sampling Techniques, 2.11; Miller 2024, Adding Error
    Bars to Evals, 2.2). It is nan for a single sample.
    """

    base: float
    """Of the base; nan if not measured."""
    carryon: float
    """Of base and carry-on; nan if not measured."""
    samples: int
    targets: int
    base_se: float
    """Standard error of `base`."""
    carryon_se: float
    """Standard error of `carryon`."""
    difference_se: float
    """Standard error of `carryon - base`, which is measured on the same targets."""
    mixture: MixtureNll | None = None
    """Of the parts of a mixture; `carryon` is then its loss. None: of a carry-on alone."""

    def to_line(self, *, of_base: bool = False) -> dict[str, Any]:
        """Return the loss of the carry-on, or of the base, for a line of metrics.jsonl."""
        parts = self.mixture.to_dict() if self.mixture and not of_base else {}
        return {
            "held_out_nll": self.base if of_base else self.carryon,
            "held_out_nll_se": null_if_nan(self.base_se if of_base else self.carryon_se),
            "held_out_targets": self.targets,
            "held_out_samples": self.samples,
            **({"mixture": parts} if parts else {}),
        }


def shown_nll(nll: float, se: float | None) -> str:
    """Return a loss with its standard error, for people."""
    return f"{nll:.4f}" if se is None or math.isnan(se) else f"{nll:.4f} +- {se:.4f}"


def null_if_nan(value: float) -> float | None:
    """Return a number as JSON can hold it."""
    return None if math.isnan(value) else value


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalJob:
    """A carry-on to measure, and the head that it is measured through."""

    carryon: CarryOn | None
    """None: only the base."""
    head: FrozenHead
    chunk: int
    """Positions whose logits exist at one time."""
    alpha: float = 1.0
    """Strength of the correction."""
    with_base: bool = False
    """Whether to measure the base too."""
    projected: ProjectedSources | None = None
    """Other bases that a carry-on with a gate is mixed with: its loss is then the mixture's."""
    token_bytes: Tensor | None = None
    """[V] bytes of each token, of a carry-on that only reads the states of other bases."""

    @property
    def corrects(self) -> bool:
        """Whether the carry-on runs: at alpha 0 a carry-on of any kind is the base."""
        return self.carryon is not None and self.alpha != 0

    @property
    def needs_base(self) -> bool:
        """Whether the base's own states are read."""
        return self.with_base or (self.carryon is not None and not self.corrects) or self.mixes

    @property
    def mixes(self) -> bool:
        """Whether other bases are mixed in."""
        return self.projected is not None and isinstance(self.carryon, MixedCarryOn)


UNREAD_BATCHES = 64
"""Batches of an evaluation on an accelerator that are read at one time: the host goes ahead."""


@dataclass(slots=True)
class _Losses:
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


def measure_nlls(
    store: StoreLike,
    samples: NDArray[np.int64],
    jobs: Sequence[EvalJob],
    *,
    stream: StreamSettings,
    endings: Endings | None = None,
    is_rough: bool = False,
) -> list[Nll]:
    """Return the mean NLL of `samples` for each job, all in one pass over their units.

    Sums are in float64; several processes share the samples. `endings` also gets the base's losses.
    With `is_rough` a head over a large vocabulary is multiplied fast (FrozenHead.is_rough).

    Raises:
        InputError: there is no supervised token in `samples`.
    """
    if is_rough:
        heads = {id(job.head): replace(job.head, is_rough=True) for job in jobs}
        jobs = [replace(job, head=heads[id(job.head)]) for job in jobs]
    processes = current_processes()
    windows = plan_pass(
        rank_rows(samples, rank=processes.rank, world_size=processes.size),
        lengths=store.sample_lengths,
        units=sample_units(store),
        tokens_per_step=min(BATCH_TOKENS, BATCH_BYTES // (2 * store.width)),
    )
    device = jobs[0].head.device
    taps = [tap for job in jobs if job.carryon for tap in taps_of(job.carryon)]
    base: BaseStates | None = None
    if any(job.needs_base for job in jobs):
        base = get_base_states(store, device=device)
        taps.append(base.tap)
    reader = Stream(
        store,
        windows,
        taps=list(dict.fromkeys(taps)),
        settings=stream,
        is_pinned=device.type == "cuda",
    )
    # Jobs with the same head share the base's losses.
    base_heads = {
        (id(job.head), job.chunk): job.head
        for job in jobs
        if job.with_base or (job.carryon is not None and not job.corrects)
    }
    base_losses = {key: _Losses() for key in base_heads}
    for sums in [*base_losses.values()][:1]:
        sums.endings = endings
    losses = [_Losses() for _ in jobs]
    mixtures = [MixtureSums(job.projected) if job.projected else None for job in jobs]
    targets = _Losses()
    bytes_of_targets = [0 for _ in jobs]
    with torch.no_grad(), reader as steps, in_eval_mode(job.carryon for job in jobs):
        for batches in track(steps, total=count_steps(windows), name="evaluate", unit="batch"):
            for batch in (each.to(device) for each in batches):
                rows = batch.rows_of_pairs()
                targets.add(torch.ones(len(rows)), rows, batch)
                for index, job in enumerate(jobs):
                    if job.token_bytes is not None:
                        bytes_of_targets[index] += int(job.token_bytes[batch.host.targets].sum())
                of_base: dict[tuple[int, int], Tensor] = {}
                for (key, head), sums in zip(base_heads.items(), base_losses.values(), strict=True):
                    assert base is not None
                    states = base.at_pairs(batch, head)
                    found = token_losses(states, batch.targets, head=head, chunk=key[1])
                    of_base[key] = found
                    sums.add(found, rows, batch)
                deltas: dict[int, Tensor] = {}  # once for all alphas
                for job, sums, mixture in zip(jobs, losses, mixtures, strict=True):
                    if job.carryon is None or not (job.corrects or job.mixes):
                        continue
                    if not job.corrects:
                        found = of_base[id(job.head), job.chunk]
                    else:
                        if id(job.carryon) not in deltas:
                            deltas[id(job.carryon)] = pair_delta(job.carryon, batch, head=job.head)
                        found = losses_of_delta(
                            job.carryon,
                            deltas[id(job.carryon)],
                            batch,
                            head=job.head,
                            chunk=job.chunk,
                            alpha=job.alpha,
                        )
                    if mixture is not None and base is not None:
                        found = _mix(job, found, batch, base=base, sums=mixture)
                    sums.add(found, rows, batch)
    for sums in (*base_losses.values(), *losses):
        sums.read()
    [count] = sum_over_processes(targets.total, device=device)
    if count == 0:
        raise InputError(
            f"{store.root}: no supervised token in the {len(samples)} samples to evaluate on"
        )
    absent = _Losses(
        total=math.nan, by_sample=[np.full_like(n, math.nan) for n in targets.by_sample]
    )
    results = []
    total = partial(sum_over_processes, device=device)
    for job, own, mixture, num_bytes in zip(jobs, losses, mixtures, bytes_of_targets, strict=True):
        base_sums = base_losses.get((id(job.head), job.chunk), absent)
        if job.carryon is None:
            own = absent
        elif not (job.corrects or job.mixes):
            own = base_sums
        base_sums = base_sums if job.with_base else absent
        nll = _nll(base_sums, own, targets, num_samples=len(samples), device=device)
        if mixture is not None and job.mixes:
            nll = replace(nll, mixture=mixture.result(count, total))
        elif job.token_bytes is not None and job.carryon is not None:
            [of_all] = total(float(num_bytes))
            nll = replace(nll, mixture=by_state(nll.carryon, of_all / count))
        results.append(nll)
    return results


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


def _nll(
    base: _Losses, carryon: _Losses, targets: _Losses, *, num_samples: int, device: torch.device
) -> Nll:
    """Return the means of one job over all processes, with their standard errors."""
    n, base_L, carryon_L = (
        np.concatenate([np.empty(0), *sums.by_sample]) for sums in (targets, base, carryon)
    )
    count, clusters, *totals = sum_over_processes(
        targets.total, float((n > 0).sum()), base.total, carryon.total, device=device
    )
    base_mean, carryon_mean = (total / count for total in totals)
    residuals = (
        base_L - base_mean * n,
        carryon_L - carryon_mean * n,
        carryon_L - base_L - (carryon_mean - base_mean) * n,
    )
    squares = sum_over_processes(*(float((each**2).sum()) for each in residuals), device=device)
    factor = clusters / (clusters - 1) if clusters > 1 else math.nan
    base_se, carryon_se, difference_se = (math.sqrt(factor * each) / count for each in squares)
    return Nll(
        base=base_mean,
        carryon=carryon_mean,
        samples=num_samples,
        targets=int(count),
        base_se=base_se,
        carryon_se=carryon_se,
        difference_se=difference_se,
    )


@contextmanager
def in_eval_mode(modules: Iterable[nn.Module | None]) -> Iterator[None]:
    """Set modules to eval mode within the block; restore all modes however it ends."""
    parts = {part: part.training for module in modules if module for part in module.modules()}
    try:
        for part in parts:
            part.training = False
        yield
    finally:
        for part, is_training in parts.items():
            part.training = is_training


def warn_if_few(targets: int) -> None:
    """Warn if a held-out loss is measured on too few targets to tell much."""
    if targets < FEW_TARGETS:
        logger.warning(
            f"{targets:,} held-out targets: expected {FEW_TARGETS:,} or more for a loss to rely "
            "on; see its standard error. Fix: more text, or a larger --held-out-ratio"
        )
