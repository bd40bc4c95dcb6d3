"""A mixture of several bases against its parts: held-out loss and training speed.

The first store is the anchor's, the others are aligned to it. All runs see the same samples in the
same order, and end with their best evaluation.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from carryon.cache.errors import InputError
from carryon.tools.bench.job import Job, split_label
from carryon.train.config import (
    Changes,
    MixSettings,
    OptimizationSettings,
    RunSettings,
    TrainSettings,
)
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.sweep import sweep

SEEDS = (0, 1, 2)
LEAST_GATE_GAIN, LEAST_GAIN, LEAST_SPEED = 0.20, 0.15, 0.7
"""Nats a target, in each of the seeds, on Python with SmolLM2-135M and Qwen2.5-Coder-0.5B; and
tokens/s of a mixture against those of one base."""


def measure_mixing(job: Job, *, epochs: int = 3) -> None:
    """Train the gate alone, a carry-on alone, and both, with three seeds each.

    Raises:
        InputError: fewer than two stores are given.
    """
    if len(job.given_stores) < 2:
        raise InputError(
            "--store: expected the anchor's store and one that is aligned to it, got "
            f"{len(job.given_stores)}. Fix: carryon extract --align-to, then --store A --store B"
        )
    anchor, *mix = (split_label(each)[1] for each in job.given_stores)
    seeds = {f"carryon.{seed}": {"seed": seed} for seed in SEEDS}
    gates = {f"gate.{seed}": {"seed": seed, "kind": "none"} for seed in SEEDS}
    alone = _train(job.work / "alone", anchor, (), seeds, epochs=epochs)
    mixed = _train(job.work / "mixed", anchor, mix, {**seeds, **gates}, epochs=epochs)
    names = list(seeds)
    gate_gains = [each.base_nll - each.carryon_nll for each in map(mixed.get, gates) if each]
    gains = [alone[name].carryon_nll - mixed[name].carryon_nll for name in names]
    job.report(
        "mixing.gate_alone",
        min(gate_gains),
        f"nats a target below the base, least of {len(SEEDS)} seeds",
        at_least=LEAST_GATE_GAIN,
        gains=gate_gains,
        base_nll=mixed[names[0]].base_nll,
        parts=[mixed[name].mixture for name in gates],
        epochs=epochs,
    )
    job.report(
        "mixing.gain",
        min(gains),
        f"nats a target below the carry-on alone, least of {len(SEEDS)} seeds",
        at_least=LEAST_GAIN,
        gains=gains,
        held_out_nll=[mixed[name].carryon_nll for name in names],
        held_out_nll_alone=[alone[name].carryon_nll for name in names],
        parts=[mixed[name].mixture for name in names],
        epochs=epochs,
    )
    job.report(
        "mixing.speed",
        statistics.median(
            mixed[name].tokens_per_second / alone[name].tokens_per_second for name in names
        ),
        "of the tokens/s of one base, projections cached",
        at_least=LEAST_SPEED,
        tokens_per_second=[mixed[name].tokens_per_second for name in names],
        tokens_per_second_alone=[alone[name].tokens_per_second for name in names],
    )


def _train(
    out: Path, anchor: str, mix: Sequence[str], runs: Mapping[str, Changes], *, epochs: int
) -> dict[str, TrainReport]:
    settings = TrainSettings(
        optimization=OptimizationSettings(epochs=epochs),
        mixing=MixSettings(mix=list(mix)),
        run=RunSettings(finish_with="best"),
    )
    return dict(zip(runs, sweep(anchor, out=out, settings=settings, runs=runs), strict=True))
