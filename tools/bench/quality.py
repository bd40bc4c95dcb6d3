"""Held-out loss of carry-ons: from lossy stores, with several taps, of presets.

Every comparison is one sweep over one store, so all runs see the same samples in the same order.
"""

import statistics
from collections.abc import Mapping
from pathlib import Path

from carryon.cache.errors import InputError
from carryon.cache.exchange.recoding import recode
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.job import Job
from carryon.tools.compare.methods import same_size
from carryon.train.config import CarryOnSettings, Changes, OptimizationSettings, TrainSettings
from carryon.train.inference.evaluate import evaluate
from carryon.train.settings_file import PRESETS, read_preset
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.sweep import sweep

PROFILE_TARGETS = {"near": 0.002, "compact": 0.005}
SEEDS = (0, 1, 2)


def measure_profiles(job: Job, *, epochs: int = 3) -> None:
    """Train on lossy copies of a store and report the loss on its exact states."""
    store = job.open_store()
    exact = train_runs(job, store.root, "exact", {"exact": {}}, epochs=epochs)["exact"]
    for profile, target in PROFILE_TARGETS.items():
        root = job.work / profile
        recode(store.root, out=root, profile=profile)
        report = train_runs(job, root, f"on-{profile}", {profile: {}}, epochs=epochs)[profile]
        evaluation = evaluate(
            store=str(store.root), carryon=report.carryon, samples="held-out", device="auto"
        )
        job.report(
            f"trained_on.{profile}",
            evaluation.carryon_nll / exact.carryon_nll - 1,
            "relative to exact",
            at_most=target,
            held_out_nll=evaluation.carryon_nll,
            held_out_nll_exact=exact.carryon_nll,
            base_nll=evaluation.base_nll,
            epochs=epochs,
        )


def measure_taps(job: Job, *, epochs: int = 3) -> None:
    """Train carry-ons of equal size on several taps and on `final` alone, with three seeds."""
    store = _open_with_layers(job)
    one = CarryOnSettings()
    runs: dict[str, Changes] = {}
    for middle in _middle_taps(store):
        several = same_size(one, taps=["final", *middle], base_width=store.width)
        changes = {"taps": several.taps, "intermediate_size": several.intermediate_size}
        runs |= {f"{'+'.join(middle)}.{seed}": changes | {"seed": seed} for seed in SEEDS}
    runs |= {f"final.{seed}": {"seed": seed} for seed in SEEDS}
    reports = train_runs(job, store.root, "taps", runs, epochs=epochs)
    mixes = [
        name for name in dict.fromkeys(x.rpartition(".")[0] for x in reports) if name != "final"
    ]
    by_mix = {
        mix: [reports[f"{mix}.{seed}"].carryon_nll for seed in SEEDS] for mix in (*mixes, "final")
    }
    best = min(mixes, key=lambda mix: statistics.mean(by_mix[mix]))
    gains = [alone - mixed for alone, mixed in zip(by_mix["final"], by_mix[best], strict=True)]
    job.report(
        "taps.seeds_better",
        sum(gain > 0 for gain in gains),
        f"of {len(SEEDS)} seeds",
        at_least=len(SEEDS),
        best=f"final+{best}",
        held_out_nll=by_mix,
        gains=gains,
        bytes_final=reports["final.0"].carryon_bytes,
        bytes_best=reports[f"{best}.0"].carryon_bytes,
        epochs=epochs,
    )


def measure_presets(job: Job, *, epochs: int = 3) -> None:
    """Train each preset for one epoch and for all; report its loss, bytes and seconds."""
    store = job.open_store()
    for number in sorted({1, epochs}):
        for name in PRESETS:
            changes = read_preset(name) | {"epochs": number}
            # One after another: a user waits for the seconds of a run alone.
            folder = f"preset-{name}-{number}"
            report = train_runs(job, store.root, folder, {name: changes}, epochs=number)[name]
            job.report(
                f"preset.{name}.epochs_{number}",
                report.carryon_nll,
                "nats, held out",
                base_nll=report.base_nll,
                megabytes=report.carryon_bytes / 1e6,
                train_s=report.train_s,
                tokens_per_second=report.tokens_per_second,
                held_out_contamination=report.held_out_contamination,
                **changes,
            )


def _open_with_layers(job: Job) -> Store:
    """Open the given store, or extract one with the base's middle layers beside `final`."""
    if job.given_stores:
        return job.open_store()
    num_layers = job.load_base().identity.num_layers
    layers = sorted({-(-num_layers // 3), -(-2 * num_layers // 3)})
    return job.open_store(StoreSettings(taps=[*(f"layer.{each}" for each in layers), "final"]))


def _middle_taps(store: Store) -> list[list[str]]:
    """Return taps to mix with `final`: the middle layer, and the highest with the lowest."""
    layers = [tap for tap in store.taps if tap.startswith("layer.")]
    layers.sort(key=lambda tap: int(tap.removeprefix("layer.")))
    if not layers:
        raise InputError(
            f"{store.root}: expected taps beside final, got {' '.join(store.taps)}. "
            "Fix: extract with --taps layer.10 layer.20 final"
        )
    return [[layers[(len(layers) - 1) // 2]], *([[layers[-1], layers[0]]] if layers[1:] else [])]


def train_runs(
    job: Job, root: Path, name: str, runs: Mapping[str, Changes], *, epochs: int
) -> dict[str, TrainReport]:
    """Train runs on a store, all over the same samples in the same order, and return their reports.

    Args:
        job: has the folder that runs are written to.
        root: of the store.
        name: of the folder of the runs.
        runs: changes of the settings of each.
        epochs: of each.
    """
    settings = TrainSettings(optimization=OptimizationSettings(epochs=epochs))
    reports = sweep(root, out=job.work / name, settings=settings, runs=runs)
    return dict(zip(runs, reports, strict=True))
