"""Releasing versions: cost in steps, bits of the trunk, learning rates.

Everything is counted on real training runs: a lineage of four versions and the other ways of
releasing, on small synthetic stores whose steps alpha divides. `experiment-paths` measures how good
versions are.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carryon.cache.settings import StoreSettings
from carryon.tools.bench.job import Job
from carryon.tools.bench.path_plan import plan_paradigms
from carryon.tools.bench.path_runs import PathRuns
from carryon.tools.bench.scratch import write_scratch_store
from carryon.tools.bench.states import make_states
from carryon.tools.compare.figure import Figure
from carryon.train.config import TrainSettings
from carryon.train.continual.lineage import update
from carryon.train.continual.lineage_dir import Lineage, open_lineage
from carryon.train.trainer.checkpoint import newest_checkpoint
from carryon.train.trainer.run import Job as TrainJob
from carryon.train.trainer.segment import Segment, digest_of_state
from carryon.train.trainer.trainer import train_segments

ALPHA = 0.6
VERSIONS = 4
STEPS = 10
"""T, steps of an increment."""
_SAMPLE_TOKENS = 16


def measure_paths(
    job: Job, *, schedules: tuple[str, ...] = ("cosine", "knee", "multistep")
) -> None:
    """Release four versions with each schedule and report what they took."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads slow down such small products
    try:
        stores = write_stores(job.work)
        for schedule in schedules:
            for figure in measure(job.work / schedule, stores, schedule):
                job.add(replace(figure, figure=f"paths.{schedule}.{figure.figure}"))
    finally:
        torch.set_num_threads(threads)


def write_stores(root: Path) -> list[str]:
    """Write a store per increment, with samples of one length: STEPS steps of an epoch."""
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
        # The lengths are equal: only the seed distinguishes the stores.
        write_scratch_store(path, states, settings=StoreSettings(unit_tokens=512, seed=seed))
        paths.append(str(path))
    return paths


def measure(root: Path, stores: Sequence[str], schedule: str) -> Iterator[Figure]:
    """Train a lineage, a trunk without branches and the other ways; yield the figures."""
    settings = TrainSettings.from_options(
        width=16,
        blocks=1,
        heads=2,
        intermediate_size=16,
        dropout=0.1,
        epochs=1,
        tokens_per_step=2 * _SAMPLE_TOKENS,
        schedule=schedule,
        min_lr_ratio=0.1,
        warmup_ratio=0.2,
        held_out_ratio=0.09,
        device="cpu",
        log_every=1,
    ).resolved()
    for store in stores:
        update(lineage=str(root / "lineage"), store=[store], settings=settings, alpha=ALPHA)
    lineage = open_lineage(root / "lineage")
    counts = _count_others(root / "others", stores, settings)
    # The steps that the lineage's runs have logged, not those of the plan.
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


def _count_others(root: Path, stores: Sequence[str], settings: TrainSettings) -> dict[str, int]:
    """Train the other ways of releasing; return the steps of each from its runs' ledgers."""
    experiment = PathRuns(root=root, stores=list(stores), settings=settings)
    experiment.begin()
    plan = plan_paradigms(
        {0: experiment.lengths(0)},
        kinds=["scratch", "restart", "low"],
        schedules=[settings.optimization.schedule],
        alphas=[],
        settings=settings.optimization,
    )
    experiment.run(plan)
    counts: dict[str, int] = {}
    for path in (root / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="ascii"))
        counts[result["kind"]] = counts.get(result["kind"], 0) + result["steps"]
    return counts


def _trunk_bits(
    root: Path, stores: Sequence[str], settings: TrainSettings, lineage: Lineage
) -> Figure:
    """Train a trunk without branches and compare its states with the lineage's."""
    start, same = None, 0
    for number, store in enumerate(stores, 1):
        last = number == len(stores)
        segment = Segment(
            paradigm="trunk",
            version=number,
            ends=tuple(lineage.ends[:number]),
            alpha=ALPHA,
            first=0,
            # The lineage's trunk ends at the last branch point.
            stop=lineage.branch_step(number) if last else STEPS,
            offset=(number - 1) * STEPS,
            start=start,
        )
        out = root / str(number)
        train_segments([store], [TrainJob(out=str(out), settings=settings, segment=segment)])
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


def _rates(lineage: Lineage, settings: TrainSettings) -> Iterator[Figure]:
    """Check the logged learning rates of the trunk and at the end of branches."""
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
    """Return the metrics of a run's steps."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
    return [line for line in lines if "loss" in line]
