"""How fast, how small and how good training from a store is."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carryon.tools.bench.command import get_measurement, run_measurements
from carryon.tools.bench.train_settings import (
    FIGURES,
    QUICK_TRAIN,
    BenchTrainSettings,
    BenchTrainSizes,
    missing_options,
)
from carryon.tools.compare.figure import Report

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """What each measurement of `python -m carryon.tools.bench train` is given."""

    settings: BenchTrainSettings
    sizes: BenchTrainSizes
    work: Path
    """A folder for what is written on the way; it is there, and is removed afterwards."""
    report: Report


def bench_train(
    *,
    out: str = "",
    work: str = "",
    quick: bool = False,
    settings: BenchTrainSettings,
    sizes: BenchTrainSizes,
) -> list[dict[str, Any]]:
    """Measure training: speed, memory and quality, beside the limits and beside other ways.

    Speeds are compared side by side: the same input, in one process, in turn, medians of several
    rounds. One JSON line for each figure goes to stdout as soon as it is known, a table to stderr
    at the end. A target that is missed reads "met": false; the exit code stays 0.

    What needs a base or a store says so on stderr and is left out without them.

    Example:
        python -m carryon.tools.bench train --base demo/base --store demo/store --figures loss lora

    Args:
        out: Folder for figures.jsonl. Empty for none.
        work: Folder for what is written on the way; what is written is removed. Empty for the
            system's folder for such things.
        quick: See in a minute that everything runs: tiny sizes, whatever the options below say.
        settings: What is measured.
        sizes: How much is measured.
    """
    chosen = QUICK_TRAIN if quick else sizes

    def measure(name: str, scratch: Path, report: Report) -> None:
        job = TrainJob(settings=settings, sizes=chosen, work=scratch, report=report)
        get_measurement(FIGURES[name])(job)

    names = []
    for name in FIGURES:
        if name not in settings.figures:
            continue
        if missing := missing_options(name, settings):
            logger.info(f"{name}: left out, it needs {' and '.join(missing)}")
        else:
            names.append(name)
    return [figure.to_dict() for figure in run_measurements(names, measure, out=out, work=work)]
