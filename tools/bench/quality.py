"""What carry-ons come to on held-out text: from lossy stores, several taps, presets, other losses.

Every comparison is one sweep over one store, so that all runs see the same samples in the same
order; only what is compared differs.
"""

import statistics
from collections.abc import Mapping
from pathlib import Path

from carryon.cache.errors import InputError
from carryon.cache.store.reader import Store
from carryon.tools.bench.recode import recode_store
from carryon.tools.bench.train import TrainJob
from carryon.tools.compare.figure import Figure
from carryon.tools.compare.methods import same_size
from carryon.train.config import (
    PRESETS,
    CarryOnSettings,
    Changes,
    OptimizationSettings,
    TrainSettings,
    read_preset,
)
from carryon.train.inference.evaluate import evaluate
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.sweep import sweep

PROFILE_TARGETS = {"near": 0.002, "compact": 0.005}
SEEDS = (0, 1, 2)


def measure_profiles(job: TrainJob) -> None:
    """Train on lossy copies of a store; what counts is the loss on its exact states."""
    store = Store.open(job.settings.store)
    exact = _train(job, store.root, "exact", {"exact": {}})["exact"]
    for profile, target in PROFILE_TARGETS.items():
        root = job.work / profile
        recode_store(store, root, profile=profile)
        report = _train(job, root, f"on-{profile}", {profile: {}})[profile]
        found = evaluate(
            store=str(store.root), carryon=report.carryon, samples="held-out", device="auto"
        )
        job.report(
            Figure(
                figure=f"trained_on.{profile}",
                value=found.carryon_nll / exact.carryon_nll - 1,
                target=target,
                unit="relative to exact",
                details={
                    "held_out_nll": found.carryon_nll,
                    "held_out_nll_exact": exact.carryon_nll,
                    "base_nll": found.base_nll,
                    "epochs": job.sizes.quality_epochs,
                },
            )
        )


def measure_taps(job: TrainJob) -> None:
    """Train on several taps and on `final` alone, of the same size, with three seeds."""
    store = Store.open(job.settings.store)
    one = CarryOnSettings()
    runs: dict[str, Changes] = {}
    for middle in _middle_taps(store):
        several = same_size(one, taps=["final", *middle], base_width=store.width)
        changes = {"taps": several.taps, "intermediate_size": several.intermediate_size}
        runs |= {f"{'+'.join(middle)}.{seed}": changes | {"seed": seed} for seed in SEEDS}
    runs |= {f"final.{seed}": {"seed": seed} for seed in SEEDS}
    reports = _train(job, store.root, "taps", runs)
    mixes = {name.rpartition(".")[0] for name in reports} - {"final"}
    by_mix = {
        mix: [reports[f"{mix}.{seed}"].carryon_nll for seed in SEEDS] for mix in (*mixes, "final")
    }
    best = min(mixes, key=lambda mix: statistics.mean(by_mix[mix]))
    gains = [alone - mixed for alone, mixed in zip(by_mix["final"], by_mix[best], strict=True)]
    job.report(
        Figure(
            figure="taps.seeds_better",
            value=sum(gain > 0 for gain in gains),
            target=len(SEEDS),
            sense="at least",
            unit=f"of {len(SEEDS)} seeds",
            details={
                "best": f"final+{best}",
                "held_out_nll": by_mix,
                "gains": gains,
                "bytes_final": reports["final.0"].carryon_bytes,
                "bytes_best": reports[f"{best}.0"].carryon_bytes,
                "epochs": job.sizes.quality_epochs,
            },
        )
    )


def measure_presets(job: TrainJob) -> None:
    """Train each preset, for one epoch and for all; its loss beside its bytes and seconds."""
    store = Store.open(job.settings.store)
    for epochs in sorted({1, job.sizes.quality_epochs}):
        for name in PRESETS:
            changes = read_preset(name) | {"epochs": epochs}
            # One after another: seconds of a run alone are what a user waits.
            report = _train(job, store.root, f"preset-{name}-{epochs}", {name: changes})[name]
            job.report(
                Figure(
                    figure=f"preset.{name}.epochs_{epochs}",
                    value=report.carryon_nll,
                    unit="nats, held out",
                    details={
                        "base_nll": report.base_nll,
                        "megabytes": report.carryon_bytes / 1e6,
                        "train_s": report.train_s,
                        "tokens_per_second": report.tokens_per_second,
                        "held_out_contamination": report.held_out_contamination,
                        **changes,
                    },
                )
            )


def measure_sampled(job: TrainJob) -> None:
    """Train with a sampled softmax and with all of it, step by step in turn, with three seeds."""
    runs: dict[str, Changes] = {}
    for seed in SEEDS:
        runs |= {
            f"{number}.{seed}": {"sampled_softmax": number, "seed": seed}
            for number in (0, job.sizes.sampled_rows)
        }
    reports = _train(job, Store.open(job.settings.store).root, "sampled", runs)
    exact = [reports[f"0.{seed}"] for seed in SEEDS]
    sampled = [reports[f"{job.sizes.sampled_rows}.{seed}"] for seed in SEEDS]
    nlls = [report.carryon_nll for report in sampled]
    exact_nlls = [report.carryon_nll for report in exact]
    job.report(
        Figure(
            figure="sampled.speed",
            value=statistics.median(
                ours.tokens_per_second / theirs.tokens_per_second
                for ours, theirs in zip(sampled, exact, strict=True)
            ),
            sense="at least",
            unit="of the exact loss's tokens/s",
            details={
                "tokens_per_second": [report.tokens_per_second for report in sampled],
                "tokens_per_second_exact": [report.tokens_per_second for report in exact],
            },
        )
    )
    job.report(
        Figure(
            figure="sampled.nll",
            value=statistics.mean(nlls) - statistics.mean(exact_nlls),
            unit="nats above the exact loss, held out, mean of three seeds",
            details={
                "held_out_nll": nlls,
                "held_out_nll_exact": exact_nlls,
                "base_nll": exact[0].base_nll,
                "rows": job.sizes.sampled_rows,
                "epochs": job.sizes.quality_epochs,
            },
        )
    )


def _middle_taps(store: Store) -> list[list[str]]:
    """Return what is mixed with `final`: the middle layer, and the highest with the lowest."""
    layers = [tap for tap in store.taps if tap.startswith("layer.")]
    layers.sort(key=lambda tap: int(tap.removeprefix("layer.")))
    if not layers:
        raise InputError(
            f"{store.root}: expected taps beside final to mix, got {' '.join(store.taps)}: extract "
            "with --taps layer.10 layer.20 final or the like"
        )
    return [[layers[(len(layers) - 1) // 2]], *([[layers[-1], layers[0]]] if layers[1:] else [])]


def _train(
    job: TrainJob, root: Path, name: str, runs: Mapping[str, Changes]
) -> dict[str, TrainReport]:
    settings = TrainSettings(optimization=OptimizationSettings(epochs=job.sizes.quality_epochs))
    reports = sweep(root, out=job.work / name, settings=settings, runs=runs)
    return dict(zip(runs, reports, strict=True))
