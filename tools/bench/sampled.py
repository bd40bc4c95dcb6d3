"""The sampled softmax against the exact loss: held-out loss at equal steps and at equal seconds.

At equal steps both losses train side by side, step by step in turn in one process, so that other
load on the machine slows both alike; their seconds give the ratio of their speeds. At equal seconds
the sampled softmax then takes as many whole epochs as fit, by that ratio, into the seconds of the
exact loss. How long that run takes beside whatever else runs then is not counted. Each schedule of
the learning rate covers its own steps. All held-out losses are exact.
"""

import statistics
from collections.abc import Sequence
from typing import Any

from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.corpora import GSM, MANPAGES, PYDOC
from carryon.tools.bench.job import Job
from carryon.train.config import Changes
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.sweep import sweep

CORPORA = (GSM, PYDOC, MANPAGES)
RATES = {PYDOC: 0.0015, MANPAGES: 0.0015}
"""Learning rates by label, where they are not the default: prose takes half of it."""
SEEDS = (0, 1, 2)
HELD_OUT_RATIO = 0.2
"""Of documents, where the corpus marks none."""
MAX_DIFFERENCE = 0.01
_MAX_TOKENS = 512


def measure_sampled(
    job: Job,
    *,
    epochs: int = 1,
    sampled: int = 2048,
    tokens: int = 33_000,
    tokens_per_step: int = 512,
) -> None:
    """Train with both losses on each corpus, with three seeds.

    Args:
        job: input.
        epochs: of the exact loss.
        sampled: negatives of a step.
        tokens: of a corpus, roughly.
        tokens_per_step: of each run.
    """
    stores = job.open_stores(
        CORPORA, settings=_settings(job), num_tokens=tokens, max_tokens=_MAX_TOKENS
    )
    for label, store in stores.items():
        common: dict[str, Any] = {
            "taps": sorted(store.taps, key=lambda tap: tap != "final"),
            "tokens_per_step": tokens_per_step,
            "held_out_ratio": HELD_OUT_RATIO,
            "evaluate_every": 1_000_000,  # at both ends only
            "learning_rate": RATES.get(label, 0.0),
        }
        exact, equal_steps = _train_both(job, store, label, common, epochs=epochs, sampled=sampled)
        ratio = statistics.median(
            one.train_s / other.train_s for one, other in zip(exact, equal_steps, strict=True)
        )
        more = max(epochs, int(epochs * ratio))
        equal_seconds = _train(
            job, store, f"{label}-seconds", common | {"epochs": more, "sampled_softmax": sampled}
        )
        _report(job, label, exact, equal_steps, equal_seconds, ratio=ratio, epochs=(epochs, more))


def _settings(job: Job) -> StoreSettings:
    """Return the settings of a store of `final` and the middle layer."""
    if not job.base:
        return StoreSettings()
    num_layers = job.load_base().identity.num_layers
    return StoreSettings(taps=[f"layer.{max(1, num_layers // 2)}", "final"])


def _train_both(
    job: Job, store: Store, label: str, common: Changes, *, epochs: int, sampled: int
) -> tuple[list[TrainReport], list[TrainReport]]:
    """Return the reports of the exact loss and of the sampled softmax, by seed."""
    runs: dict[str, Changes] = {
        f"{number}.{seed}": {"sampled_softmax": number, "seed": seed}
        for seed in SEEDS
        for number in (0, sampled)
    }
    reports = sweep(store.root, out=job.work / f"{label}-steps", runs=runs, epochs=epochs, **common)
    return reports[::2], reports[1::2]


def _train(job: Job, store: Store, name: str, settings: Changes) -> list[TrainReport]:
    runs: dict[str, Changes] = {str(seed): {"seed": seed} for seed in SEEDS}
    return sweep(store.root, out=job.work / name, runs=runs, **settings)


def _report(
    job: Job,
    label: str,
    exact: Sequence[TrainReport],
    equal_steps: Sequence[TrainReport],
    equal_seconds: Sequence[TrainReport],
    *,
    ratio: float,
    epochs: tuple[int, int],
) -> None:
    differences = _differences(equal_steps, exact)
    job.report(
        f"sampled.{label}.speed",
        ratio,
        "of the exact loss's steps/s, median of seeds",
        train_s=[each.train_s for each in equal_steps],
        train_s_exact=[each.train_s for each in exact],
    )
    job.report(
        f"sampled.{label}.equal_steps",
        statistics.mean(differences),
        "nats above the exact loss, held out, mean of seeds",
        at_most=MAX_DIFFERENCE,
        differences=differences,
        difference_of_seeds_se=statistics.stdev(differences) / len(differences) ** 0.5,
        held_out_nll=[each.carryon_nll for each in equal_steps],
        held_out_nll_exact=[each.carryon_nll for each in exact],
        base_nll=exact[0].base_nll,
        held_out_targets=exact[0].held_out_targets,
        steps=exact[0].num_steps,
        epochs=epochs[0],
    )
    gains = _differences(exact, equal_seconds)
    job.report(
        f"sampled.{label}.equal_seconds",
        sum(gain > 0 for gain in gains),
        f"of {len(SEEDS)} seeds with a lower held-out loss than the exact loss",
        at_least=len(SEEDS),
        differences=[-gain for gain in gains],
        held_out_nll=[each.carryon_nll for each in equal_seconds],
        of_the_exact_seconds=epochs[1] / epochs[0] / ratio,
        steps=equal_seconds[0].num_steps,
        epochs=epochs[1],
    )


def _differences(one: Sequence[TrainReport], other: Sequence[TrainReport]) -> list[float]:
    return [a.carryon_nll - b.carryon_nll for a, b in zip(one, other, strict=True)]
