"""Which held-out samples a run evaluates on its way: as many as a tenth of its time allows.

The choice is a pure function of settings, store and seeds: a resumed run evaluates the same samples
at each step, and runs of about equal cost share them. The end of a run is evaluated on all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carryon.train.data.sampler import Window, count_steps

MAX_RATIO = 0.1
"""Seconds of evaluations during a run, per second of its steps."""
EVALUATION_COST = 0.6
"""Seconds of a multiplication in an evaluation, in those of one in a training step, with some room.
A bottleneck and 2,048 sampled negatives on one core: 0.3 with Qwen2.5-Coder-0.5B. The products of
an evaluation are large, those of a step many and small."""
MAX_TOKENS = 65_536
"""More are not evaluated on the way: the standard error is small, and the whole comes at the end.
"""
MIN_SAMPLES, MIN_TARGETS = 6, 500
"""Evaluated at any cost, where there are as many. Samples of a corpus differ by about 0.3 nats per
target, so that the standard error is at most about 0.12 nats, and far smaller between two steps."""
_STEPS_PER_OCTAVE = 2
"""Numbers of tokens are rounded down to powers of sqrt(2), so that similar runs share them."""
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Multiplications of a run."""

    weights: int
    """P, all weights of the carry-on."""
    width: int
    """D, of the base."""
    vocabulary: int
    """V."""
    trained_rows: int
    """K, rows of the head that a step multiplies for each target: V, or fewer if it samples."""

    def of_training(self, tokens: float, targets: float) -> float:
        """Return those of steps: the carry-on forward and backward, the head for loss and gradient.

        The head is frozen, so it has no third product.
        """
        return 3 * self.weights * tokens + 2 * self.width * self.trained_rows * targets

    def of_evaluation(self, tokens: float, targets: float) -> float:
        """Return those of an evaluation: the carry-on forward, and the loss over all V."""
        return self.weights * tokens + self.width * self.vocabulary * targets


def count_evaluations(
    epochs: Sequence[Sequence[Window]], *, first: int, every: int, includes_last: bool
) -> int:
    """Return the evaluations of a run before its end: that of the base, and those on the way.

    Args:
        epochs: order of every epoch.
        first: steps that were taken before this run.
        every: steps between evaluations. 0: at the end of each epoch.
        includes_last: whether the last step is evaluated like the others too.
    """
    ends = np.cumsum([count_steps(windows) for windows in epochs]).tolist()
    last = ends[-1]
    due = set(range(every, last + 1, every)) if every else set(ends)
    on_the_way = {step for step in due - {last} if step > first}
    return 1 + len(on_the_way) + includes_last


def evaluation_ratio(
    work: Work,
    *,
    trained: tuple[float, float],
    evaluated: tuple[float, float],
    num_evaluations: int,
) -> float:
    """Return the seconds of evaluations per second of steps.

    Args:
        work: of the run.
        trained: tokens and targets of all steps.
        evaluated: tokens and targets of an evaluation.
        num_evaluations: see `count_evaluations`.
    """
    of_each = EVALUATION_COST * work.of_evaluation(*evaluated)
    return num_evaluations * of_each / max(1.0, work.of_training(*trained))


def choose_evaluated(
    held_out: NDArray[np.int64],
    lengths: NDArray[np.int32],
    *,
    targets_per_token: float,
    share: float,
) -> NDArray[np.int64]:
    """Return the held-out samples to evaluate during a run, in stored order.

    They are spread evenly over the stored order, in which stores and parts of a mix stand one after
    another. A smaller share is part of a larger one.

    Args:
        held_out: indices of all of them, in stored order.
        lengths: [S] tokens of every sample.
        targets_per_token: of the held-out samples.
        share: fraction of their tokens that the run can afford.
    """
    # A multiple of the golden ratio modulo 1 as rank: the first k ranks are spread for every k.
    order = held_out[np.argsort(np.arange(len(held_out)) * _GOLDEN % 1, kind="stable")]
    tokens = np.cumsum(lengths[order], dtype=np.int64)
    affordable = share * int(tokens[-1])
    if affordable >= tokens[-1] and tokens[-1] <= MAX_TOKENS:
        return held_out
    count = int((tokens <= _rounded_down(min(affordable, MAX_TOKENS))).sum())
    needed = MIN_TARGETS / max(targets_per_token, 1e-9)
    floor = max(MIN_SAMPLES, 1 + int((tokens < needed).sum()))
    return np.sort(order[: max(count, floor)])


def first_samples(
    held_out: NDArray[np.int64], lengths: NDArray[np.int32], *, max_tokens: int
) -> NDArray[np.int64]:
    """Return the first held-out samples of at most `max_tokens` together, at least one."""
    tokens = np.cumsum(lengths[held_out], dtype=np.int64)
    return held_out[: max(1, int((tokens <= max_tokens).sum()))]


def _rounded_down(tokens: float) -> float:
    if tokens <= 1:
        return 0.0
    return float(2 ** (math.floor(_STEPS_PER_OCTAVE * math.log2(tokens)) / _STEPS_PER_OCTAVE))
