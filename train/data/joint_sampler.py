"""The joint order of several runs: the steps to make of each window, and the runs that take them.

Runs that read the same windows share them, and runs with equal steps share those too. Pure:
nothing is read, and a position is reached by a seek.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from carryon.train.data.sampler import Window, rank_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class JointStep:
    """One step of a joint order."""

    runs: tuple[int, ...]
    """Runs that take it, counted from 0."""
    has_rows: bool
    """Whether this process has samples in it; if not, the stream has no batches for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JointOrder:
    """The steps that are left for several runs."""

    windows: list[Window]
    """To read, in order; they hold the steps of `steps` that have rows."""
    steps: list[JointStep]


def join_orders(
    orders: Sequence[Sequence[Window]], done: Sequence[int], *, rank: int, world_size: int
) -> JointOrder:
    """Return the steps that are left for several runs.

    Args:
        orders: windows of each run, from its first epoch to its last. All runs have the same units
            in a window; runs with the same steps in it share one object.
        done: steps that each run has done.
        rank: of this process.
        world_size: number of processes, which share the samples of every batch.
    """
    before = [0] * len(orders)
    windows: list[Window] = []
    steps: list[JointStep] = []
    for number in range(max((len(order) for order in orders), default=0)):
        runs_of: dict[int, list[int]] = {}
        for run, order in enumerate(orders):
            if number < len(order):
                runs_of.setdefault(id(order[number]), []).append(run)
        left = []
        for group, runs in enumerate(runs_of.values()):
            window = orders[runs[0]][number]
            skipped = min(len(window.steps), max(0, min(done[run] - before[run] for run in runs)))
            for index, batches in enumerate(window.steps[skipped:], skipped):
                takers = tuple(run for run in runs if done[run] <= before[run] + index)
                if takers:
                    # All groups end together, each with its steps spread evenly before.
                    place = (index + 1) / len(window.steps)
                    left.append((place, group, takers, batches))
            for run in runs:
                before[run] += len(window.steps)
        own_steps = []
        for _, _, takers, batches in sorted(left, key=lambda item: item[:2]):
            parts = (rank_rows(batch, rank=rank, world_size=world_size) for batch in batches)
            own = tuple(part for part in parts if len(part))
            steps.append(JointStep(runs=takers, has_rows=bool(own)))
            if own:
                own_steps.append(own)
        if own_steps:
            units = orders[next(iter(runs_of.values()))[0]][number].units
            windows.append(Window(units=units, steps=tuple(own_steps)))
    return JointOrder(windows=windows, steps=steps)
