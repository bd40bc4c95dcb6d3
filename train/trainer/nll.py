"""TODO."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.errors import InputError
from carryon.cache.progress import track
from carryon.cache.store.reader import Store
from carryon.train.config import StreamSettings
from carryon.train.data.loader import Stream
from carryon.train.data.sampler import count_steps, plan_pass, rank_rows
from carryon.train.data.split import sample_units
from carryon.train.losses.base_states import BaseStates, get_base_states
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.modules.carryon import CarryOn
from carryon.train.modules.taps import stream_taps
from carryon.train.trainer.distributed import current_processes, sum_over_processes
from carryon.train.trainer.step import losses_of_delta, pair_delta

BATCH_TOKENS = 4096
"""Tokens of an evaluation's batch, at most."""


BATCH_BYTES = 20 << 20
"""States of a tap in an evaluation's batch, at most; else evaluating a wide base would take more
memory than training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nll:
    """Mean negative log-likelihood of supervised tokens, in nats."""

    base: float
    """Of the base alone; nan where it was not asked for."""
    carryon: float
    """Of base and carry-on; nan where it was not asked for."""
    samples: int
    """Samples looked at."""
    targets: int
    """Supervised tokens looked at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalJob:
    """A carry-on to be measured, and the head that it is measured through."""

    carryon: CarryOn | None
    """None: only the base."""
    head: FrozenHead
    chunk: int
    """Supervised positions whose logits exist at one time."""
    alpha: float = 1.0
    """Strength of the correction."""
    with_base: bool = False
    """Whether the base is measured too."""

    @property
    def needs_base(self) -> bool:
        """Whether the base's own states are."""
        return self.with_base or (self.carryon is not None and self.alpha == 0)


def measure_nlls(
    store: Store,
    samples: NDArray[np.int64],
    judged: Sequence[EvalJob],
    *,
    stream: StreamSettings,
) -> list[Nll]:
    """Return the mean NLL of `samples` for each carry-on, all in one pass over their units.

    Sums are in float64; several processes share the samples.

    Raises:
        InputError: there is no supervised token in `samples`.
    """
    processes = current_processes()
    windows = plan_pass(
        rank_rows(samples, rank=processes.rank, world_size=processes.size),
        lengths=store.sample_lengths,
        units=sample_units(store),
        tokens_per_step=min(BATCH_TOKENS, BATCH_BYTES // (2 * store.width)),
    )
    device = judged[0].head.device
    taps = [tap for each in judged if each.carryon for tap in stream_taps(each.carryon.settings)]
    base: BaseStates | None = None
    if any(each.needs_base for each in judged):
        base = get_base_states(store, device=device)
        taps.append(base.tap)
    sums = [[0.0, 0.0] for _ in judged]
    targets = 0
    reader = Stream(
        store,
        windows,
        taps=list(dict.fromkeys(taps)),
        settings=stream,
        is_pinned=device.type == "cuda",
    )
    modules = {id(each.carryon): each.carryon for each in judged if each.carryon is not None}
    with torch.no_grad(), reader as steps, _without_dropout(modules.values()):
        for batches in track(steps, total=count_steps(windows), name="evaluate", unit="batches"):
            for batch in (each.to(device) for each in batches):
                targets += batch.num_targets
                bases: dict[tuple[int, int], float] = {}
                deltas: dict[int, torch.Tensor] = {}
                for each, total in zip(judged, sums, strict=True):
                    head, chunk = each.head, each.chunk
                    if base is not None and each.needs_base:
                        key = (id(head), chunk)
                        if key not in bases:
                            states = base.at_pairs(batch, head)
                            losses = token_losses(states, batch.targets, head=head, chunk=chunk)
                            bases[key] = float(losses.double().sum())
                        total[0] += bases[key]
                    if each.carryon is not None and each.alpha == 0:
                        total[1] += bases[key]  # the base itself, for carry-ons of any kind
                    elif each.carryon is not None:
                        if id(each.carryon) not in deltas:  # once for all alphas
                            deltas[id(each.carryon)] = pair_delta(each.carryon, batch, head=head)
                        delta = deltas[id(each.carryon)]
                        losses = losses_of_delta(
                            each.carryon, delta, batch, head=head, chunk=chunk, alpha=each.alpha
                        )
                        total[1] += float(losses.double().sum())
    flat = [value for total in sums for value in total]
    count, *found = sum_over_processes(targets, *flat, device=device)
    if count == 0:
        raise InputError(
            f"{store.root}: no supervised token in the {len(samples)} samples to evaluate on"
        )
    return [
        Nll(
            base=base / count if each.with_base else math.nan,
            carryon=carryon / count if each.carryon is not None else math.nan,
            samples=len(samples),
            targets=int(count),
        )
        for each, base, carryon in zip(judged, found[::2], found[1::2], strict=True)
    ]


@contextmanager
def _without_dropout(carryons: Iterable[CarryOn]) -> Iterator[None]:
    before = [(carryon, carryon.training) for carryon in carryons]
    for carryon, _ in before:
        carryon.eval()
    yield
    for carryon, is_training in before:
        carryon.train(is_training)
