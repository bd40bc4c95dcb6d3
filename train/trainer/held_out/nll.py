"""Held-out loss of the base and of several carry-ons, measured in one pass over a store."""

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from carryon.cache.errors import InputError
from carryon.cache.progress import track
from carryon.cache.store.view import StoreLike
from carryon.train.config import StreamSettings
from carryon.train.data.loader import Stream
from carryon.train.data.sampler import count_steps, plan_pass, rank_rows
from carryon.train.data.split import sample_units
from carryon.train.losses.base_states import get_base_states
from carryon.train.losses.endings import Endings
from carryon.train.mixing.mixture_nll import MixtureNll, by_state
from carryon.train.modules.carryon import taps_of
from carryon.train.trainer.distributed import current_processes, sum_over_processes
from carryon.train.trainer.held_out.job import EvalJob
from carryon.train.trainer.held_out.sums import JobSums, Losses, PassSums

logger = logging.getLogger(__name__)

BATCH_TOKENS = 4096
"""Maximum tokens of an evaluation's batch."""
BATCH_BYTES = 20 << 20
"""Maximum bytes of a batch's states at one tap: evaluating a wide base then needs no more memory
than training."""
_MAX_EXP = math.log(sys.float_info.max)
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


def perplexity_of(nll: float) -> float:
    """Return e to the power of a loss; of one that is too large the largest number."""
    return math.exp(nll) if not nll > _MAX_EXP else sys.float_info.max


def null_if_nan(value: float) -> float | None:
    """Return a number as JSON can hold it."""
    return None if math.isnan(value) else value


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
    device = jobs[0].head.device
    needs_base = any(job.needs_base for job in jobs)
    base = get_base_states(store, device=device) if needs_base else None
    taps = [tap for job in jobs if job.carryon for tap in taps_of(job.carryon)]
    reader, num_steps = _plan(
        store, samples, taps=[*taps, base.tap] if base else taps, stream=stream, device=device
    )
    sums = PassSums(jobs, base=base, endings=endings)
    with torch.no_grad(), reader as steps, in_eval_mode(job.carryon for job in jobs):
        for batches in track(steps, total=num_steps, name="evaluate", unit="batch"):
            for batch in batches:
                sums.add(batch.to(device))
    sums.read()
    [count] = sum_over_processes(sums.targets.total, device=device)
    if count == 0:
        raise InputError(
            f"{store.root}: no supervised token in the {len(samples)} samples to evaluate on"
        )
    return [
        _result(each, sums, count, num_samples=len(samples), device=device) for each in sums.jobs
    ]


def _plan(
    store: StoreLike,
    samples: NDArray[np.int64],
    *,
    taps: Sequence[str],
    stream: StreamSettings,
    device: torch.device,
) -> tuple[Stream, int]:
    """Return a reader of this process's share of the samples, and how many steps it has."""
    processes = current_processes()
    windows = plan_pass(
        rank_rows(samples, rank=processes.rank, world_size=processes.size),
        lengths=store.sample_lengths,
        units=sample_units(store),
        tokens_per_step=min(BATCH_TOKENS, BATCH_BYTES // (2 * store.width)),
    )
    reader = Stream(
        store,
        windows,
        taps=list(dict.fromkeys(taps)),
        settings=stream,
        is_pinned=device.type == "cuda",
    )
    return reader, count_steps(windows)


def _result(
    sums: JobSums, of_pass: PassSums, count: float, *, num_samples: int, device: torch.device
) -> Nll:
    """Return the means of one job over all processes, which have `count` targets."""
    job, targets = sums.job, of_pass.targets
    absent = Losses(
        total=math.nan, by_sample=[np.full_like(n, math.nan) for n in targets.by_sample]
    )
    of_base = of_pass.of_base(job) or absent
    own = sums.losses
    if job.carryon is None:
        own = absent
    elif not (job.corrects or job.mixes):
        own = of_base
    nll = _nll(
        of_base if job.with_base else absent, own, targets, num_samples=num_samples, device=device
    )
    total = partial(sum_over_processes, device=device)
    if sums.mixture is not None and job.mixes:
        return replace(nll, mixture=sums.mixture.result(count, total))
    if job.token_bytes is not None and job.carryon is not None:
        [num_bytes] = total(float(sums.num_bytes))
        return replace(nll, mixture=by_state(nll.carryon, num_bytes / count))
    return nll


def _nll(
    base: Losses, carryon: Losses, targets: Losses, *, num_samples: int, device: torch.device
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
