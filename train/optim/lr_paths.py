"""Learning-rate paths over growing data: pure functions of the step.

Data arrives in increments, and each releases a version. Steps are counted from the start of the
lineage; increment i ends at step `ends[i]`. A path is the sequence of learning rates that the
weights of one version have seen.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from carryon.cache.errors import InputError
from carryon.train.config import OptimizationSettings
from carryon.train.optim.lr_schedule import decayed_rate, learning_rate, progress

Paradigm = Literal["scratch", "restart", "low", "switch", "trunk", "wsd-s", "wsm"]
"""`scratch`: from new weights on all data so far. `restart`: from the last version, with a full
schedule again. `low`: from the last version, at the minimum rate. `switch`: a branch that decays,
off a `trunk` that never does. `wsd-s`: as `switch`, but the next version starts from the decayed
branch. `wsm`: no branch; a version is the mean of checkpoints of the trunk."""
PARADIGMS: tuple[Paradigm, ...] = get_args(Paradigm)
BRANCH_SCHEDULES = ("cosine", "knee", "multistep")
"""Schedules that a branch can decay by."""


def path_rate(
    step: int,
    *,
    paradigm: Paradigm,
    version: int,
    ends: Sequence[int],
    alpha: float,
    settings: OptimizationSettings,
) -> float:
    """Return the learning rate of `step` on the path that leads to `version`.

    Args:
        step: from 0, below ends[version - 1].
        paradigm: how versions follow each other.
        version: from 1.
        ends: the step at which each increment ends.
        alpha: fraction of an increment's steps in which a branch decays.
        settings: schedule, peak and minimum learning rate, warm-up.
    """
    assert settings.learning_rate > 0, "expected resolved settings"
    stop = ends[version - 1]
    if paradigm == "scratch":
        return learning_rate(step, num_steps=stop, settings=settings)
    first = ends[version - 2] if version > 1 else 0
    if paradigm in ("restart", "low", "wsd-s"):
        while step < first:  # a step of an earlier version
            version -= 1
            first, stop = (ends[version - 2] if version > 1 else 0), first
    if paradigm == "restart" or (paradigm == "low" and version == 1):
        return learning_rate(step - first, num_steps=stop - first, settings=settings)
    if paradigm == "low":
        return settings.learning_rate * settings.min_lr_ratio
    branch = branch_point(first, stop, alpha=alpha)
    warmup_steps = round(settings.warmup_ratio * ends[0])
    if step < warmup_steps:
        return settings.learning_rate * (step + 1) / warmup_steps
    if paradigm in ("trunk", "wsm") or step < branch:
        return settings.learning_rate
    return decayed_rate(progress(step, first=branch, num_steps=stop), settings)


def branch_point(first: int, stop: int, *, alpha: float) -> int:
    """Return the step at which the branch of the increment from `first` to `stop` leaves.

    Raises:
        InputError: alpha is out of range, or leaves the branch fewer than two steps.
    """
    length = stop - first
    falling = round(alpha * length)
    if not 0 < alpha <= 1:
        raise InputError(f"alpha: expected more than 0, up to 1, got {alpha}")
    if falling < 2:
        raise InputError(
            f"alpha: expected {alpha:g} of the increment's {length} steps to be 2 or more, got "
            f"{falling}. Fix: give more data, more epochs, fewer tokens_per_step or a larger alpha"
        )
    return stop - falling
