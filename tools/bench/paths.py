"""Whether releases leave the trunk's bits alone, and what they cost.

Everything is counted on runs that are really trained: a lineage of four versions, and the other
paradigms beside it, on small made-up stores whose increments have a number of steps that alpha
divides. How good the versions are is for `python -m carryon.tools.bench experiment-paths`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carryon.tools.compare.figure import Figure, Report

if TYPE_CHECKING:
    from carryon.train.config import TrainSettings
    from carryon.train.continual.lineage_dir import Lineage

ALPHA = 0.6
VERSIONS = 4
STEPS = 10
"""T, steps of an increment."""
_SAMPLE_TOKENS = 16


def bench_paths(*, out: str = "", work: str = "") -> list[dict[str, Any]]:
    """Measure releasing versions: cost in steps, exactness of the trunk, learning rates.

    Four increments of made-up data, ten steps each, alpha 0.6; cosine, knee and multistep. One
    JSON line for each figure goes to stdout, a table to stderr at the end. A target that is missed
    reads "met": false; the exit code stays 0.

    Example:
        python -m carryon.tools.bench paths --out figures

    Args:
        out: Folder for figures.jsonl. Empty for none.
        work: Folder for what is written on the way; what is written is removed. Empty for the
            system's folder for such things.
    """
    import torch

    from carryon.tools.bench.command import run_measurements
    from carryon.train.optim.lr_paths import BRANCH_SCHEDULES

    torch.set_num_threads(1)  # on such small products several mostly wait for each other

    def run(schedule: str, scratch: Path, report: Report) -> None:
        for figure in measure(scratch / schedule, write_stores(scratch), schedule):
            report(replace(figure, figure=f"paths.{schedule}.{figure.figure}"))

    found = run_measurements(BRANCH_SCHEDULES, run, out=out, work=work)
    return [figure.to_dict() for figure in found]


def write_stores(root: Path) -> list[str]:
    """Write a store for each increment, with samples of one length: STEPS steps of an epoch."""
    import numpy as np

    from carryon.cache.settings import StoreSettings
    from carryon.tools.bench.scratch import write_scratch_store
    from carryon.tools.bench.states import make_states

    paths = []
    for seed in range(VERSIONS):
        states = make_states(
            f"increment-{seed + 1}",
            num_samples=2 * STEPS + 2,  # two samples a step, two held out
            width=16,
            num_taps=1,
            mean_tokens=1000,
            max_tokens=_SAMPLE_TOKENS,
            seed=seed,
        )
        lengths = np.full_like(states.lengths, _SAMPLE_TOKENS)
        rows = int(lengths.sum())
        states = replace(
            states,
            lengths=lengths,
            tokens=np.resize(states.tokens, rows),
            hidden={tap: np.resize(each, (rows, 16)) for tap, each in states.hidden.items()},
        )
        path = root / f"store-{seed + 1}"
        # The seed tells the stores apart, whose lengths are alike.
        write_scratch_store(path, states, settings=StoreSettings(unit_tokens=512, seed=seed))
        paths.append(str(path))
    return paths


def measure(root: Path, stores: Sequence[str], schedule: str) -> Iterator[Figure]:
    """Train a lineage, a trunk without branches and the other paradigms; yield the figures."""
    from carryon.train.config import (
        CarryOnSettings,
        OptimizationSettings,
        RunSettings,
        StreamSettings,
        TrainSettings,
    )
    from carryon.train.continual.lineage import update
    from carryon.train.continual.lineage_dir import open_lineage

    settings = TrainSettings(
        carryon=CarryOnSettings(width=16, blocks=1, heads=2, intermediate_size=16, dropout=0.1),
        optimization=OptimizationSettings(
            epochs=1,
            tokens_per_step=2 * _SAMPLE_TOKENS,
            schedule=schedule,  # type: ignore[arg-type]
            min_lr_ratio=0.1,
            warmup_ratio=0.2,
        ),
        stream=StreamSettings(held_out_ratio=0.09),
        run=RunSettings(device="cpu", log_every=1),
    ).resolved()
    for store in stores:
        update(lineage=str(root / "lineage"), store=[store], settings=settings, alpha=ALPHA)
    lineage = open_lineage(root / "lineage")
    counts = _count_others(root / "others", stores, settings)
    # Every step that the lineage's runs have logged, whatever the plan says.
    counts["switch"] = sum(len(_lines(path)) for path in lineage.root.glob("*/*/metrics.jsonl"))
    for kind, target in {"switch": 0.58, "restart": 0.4, "low": 0.4}.items():
        yield Figure(
            figure=f"steps.{kind}",
            value=counts[kind] / counts["scratch"],
            target=target,
            unit="of scratch",
            details={"steps": counts[kind], "scratch_steps": counts["scratch"]},
        )
    yield _trunk_bits(root / "unbranched", stores, settings, lineage)
    yield from _rates(lineage, settings)


def _count_others(root: Path, stores: Sequence[str], settings: "TrainSettings") -> dict[str, int]:
    """Train the other paradigms; return the steps of each, as the ledgers of their runs say."""
    from carryon.tools.bench.path_plan import plan_paradigms
    from carryon.tools.bench.path_runs import PathRuns

    experiment = PathRuns(root=root, stores=list(stores), settings=settings)
    experiment.begin()
    plan = plan_paradigms(
        {0: experiment.lengths(0)},
        kinds=["scratch", "restart", "low"],
        schedules=[settings.optimization.schedule],
        alphas=[],
        settings=settings.optimization,
    )
    experiment.run(plan, plan)
    counts: dict[str, int] = {}
    for path in (root / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="ascii"))
        counts[result["kind"]] = counts.get(result["kind"], 0) + result["steps"]
    return counts


def _trunk_bits(
    root: Path, stores: Sequence[str], settings: "TrainSettings", lineage: "Lineage"
) -> Figure:
    """Train a trunk without a branch, each increment whole, and compare where both stand last."""
    from carryon.train.trainer.checkpoint import newest_checkpoint
    from carryon.train.trainer.segment import Segment, digest_of_state
    from carryon.train.trainer.trainer import Job, train_segments

    start, same = None, 0
    for number, store in enumerate(stores, 1):
        last = number == len(stores)
        segment = Segment(
            paradigm="trunk",
            version=number,
            ends=tuple(lineage.ends[:number]),
            alpha=ALPHA,
            first=0,
            # The lineage's trunk has gone up to the last branch point, no further.
            stop=lineage.branch_step(number) if last else STEPS,
            offset=(number - 1) * STEPS,
            start=start,
        )
        out = root / str(number)
        train_segments([store], [Job(out=str(out), settings=settings, segment=segment)])
        start = newest_checkpoint(out / "checkpoints")
        part = lineage.head(number) if last else lineage.tail(number)
        theirs = newest_checkpoint(part.checkpoints)
        assert start is not None
        assert theirs is not None
        same += digest_of_state(start) == digest_of_state(theirs)
    return Figure(
        figure="trunk.same_bits",
        value=same,
        target=len(stores),
        sense="at least",
        unit="points, weights and optimizer state",
    )


def _rates(lineage: "Lineage", settings: "TrainSettings") -> Iterator[Figure]:
    """Compare the learning rates that the runs have logged: trunk, branches, the end."""
    top = settings.optimization.learning_rate
    bottom = top * settings.optimization.min_lr_ratio
    warmup_steps = round(settings.optimization.warmup_ratio * STEPS)
    on_trunk = ends = 0
    for number in range(1, VERSIONS + 1):
        before = [lineage.head(each) for each in range(1, number + 1)]
        before += [lineage.tail(each) for each in range(1, number)]
        rates = [line["learning_rate"] for part in before for line in _lines(part.metrics)]
        warm, high = sorted(rates)[:warmup_steps], sorted(rates)[warmup_steps:]
        rising = [top * (step + 1) / warmup_steps for step in range(warmup_steps)]
        is_whole = len(rates) == round((number - ALPHA) * STEPS)
        on_trunk += is_whole and warm[:-1] == rising[:-1] and set(high) | {warm[-1]} == {top}
        ends += _lines(lineage.version(number).metrics)[-1]["learning_rate"] == bottom
    yield Figure(
        figure="rates.on_trunk",
        value=on_trunk,
        target=VERSIONS,
        sense="at least",
        unit="versions, up to (i - alpha) T",
    )
    yield Figure(
        figure="rates.end_at_minimum",
        value=ends,
        target=VERSIONS,
        sense="at least",
        unit="versions, exactly",
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics that stand for a step; every step has logged one."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    return [line for line in lines if "loss" in line]
