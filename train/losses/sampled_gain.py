"""Time the exact loss and the sampled softmax on a step's targets, beside a run.

Nothing of the run is used but its head: states are made up, and no random state is changed.
Letters: M positions, D base width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.store.view import StoreLike
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import FrozenHead
from carryon.train.losses.sampled_softmax import (
    most_frequent,
    sampled_head,
    with_sampled_softmax,
)

NUM_SAMPLED = 2048
"""Negatives that are proposed."""
_CALL_S = 0.3  # of the timed part of the exact loss
_MIN_POSITIONS = 32
_COUNTED_UNITS = 8  # whose frequent tokens stand for those of the store


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSeconds:
    """Seconds for the M targets of a step."""

    exact: float
    """Of the exact loss with its gradient."""
    sampled: float
    """Of the sampled softmax with its gradient."""


def evaluation_seconds(head: FrozenHead, targets: Tensor, *, chunk: int, at_most_s: float) -> float:
    """Return the seconds of the exact loss of a target without gradient.

    Args:
        head: of the run.
        targets: [M] of a step.
        chunk: positions whose logits exist at one time.
        at_most_s: seconds of a target, to choose how many are timed.
    """
    some = _some(targets.to(head.device), at_most_s)
    exact = replace(head, frequent=None)
    states = exact.rows(some).float()

    def call() -> None:
        with torch.no_grad():
            float(token_losses(states, some, head=exact, chunk=chunk).sum())

    return _seconds(call) / len(some)


def time_losses(
    head: FrozenHead, store: StoreLike, targets: Tensor, *, chunk: int, at_most_s: float
) -> LossSeconds:
    """Time both losses; the exact one on some of the targets, for about a third of a second.

    Args:
        head: of the run, without frequent rows.
        store: with the tokens whose frequency counts.
        targets: [M] of a step.
        chunk: positions whose logits exist at one time.
        at_most_s: seconds of a target, to choose how many are timed.
    """
    targets = targets.to(head.device)
    some = _some(targets, at_most_s)
    device = [head.device] if head.device.type == "cuda" else []
    with torch.random.fork_rng(devices=device):
        exact = _seconds(lambda: _loss(head, some, chunk=chunk)) / len(some) * len(targets)
        scores = (
            _counts(store, head.vocab_size) + 1
        )  # as many rows as with the base's probabilities
        sampling = with_sampled_softmax(head, scores, NUM_SAMPLED)

        def call() -> None:
            _loss(sampled_head(sampling, targets), targets, chunk=chunk)

        call()  # sets up what the steps of such a run set up once
        return LossSeconds(exact=exact, sampled=_seconds(call))


def expected_rows(vocab_size: int) -> int:
    """Return about how many rows of the head a step of the sampled softmax multiplies."""
    return min(vocab_size, most_frequent(vocab_size) + NUM_SAMPLED)


def _some(targets: Tensor, at_most_s: float) -> Tensor:
    count = int(_CALL_S / max(at_most_s, 1e-9))
    return targets[: max(_MIN_POSITIONS, count)]


def _loss(head: FrozenHead, targets: Tensor, *, chunk: int) -> None:
    states = head.rows(targets).float().requires_grad_()
    losses = token_losses(states, targets, head=head, chunk=chunk)
    [gradient] = torch.autograd.grad(losses.sum(), states)
    float(gradient[0, 0])  # waits for an accelerator


def _seconds(call: Callable[[], None]) -> float:
    started_at = perf_counter()
    call()
    return perf_counter() - started_at


def _counts(store: StoreLike, vocab_size: int) -> NDArray[np.int64]:
    """Return the occurrences of tokens in some units, [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    chosen = np.linspace(0, store.num_units - 1, min(store.num_units, _COUNTED_UNITS))
    for unit in sorted(set(chosen.astype(np.int64).tolist())):
        counts += np.bincount(store.read_unit(unit, taps=[]).tokens, minlength=vocab_size)
    return counts
