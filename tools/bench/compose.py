"""What a customized model costs beside its base, and that it is exact."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from carryon.tools.bench.compose_settings import (
    FIGURES,
    QUICK_COMPOSE,
    BenchComposeSettings,
    BenchComposeSizes,
)


def bench_compose(
    *,
    out: str = "",
    work: str = "",
    quick: bool = False,
    settings: BenchComposeSettings,
    sizes: BenchComposeSizes,
) -> list[dict[str, Any]]:
    """Measure customized models: speed, memory and exactness beside the base alone.

    The carry-ons are made up for the base: random weights, and corrections about a third as large
    as the states they correct. Speeds are compared side by side: the same prompts, in one process,
    in turn, medians of several rounds. One JSON line for each figure goes to stdout as soon as it
    is known, a table to stderr at the end. A target that is missed reads "met": false; the exit
    code stays 0.

    Example:
        python -m carryon.tools.bench compose --base demo/base

    Args:
        out: Folder for figures.jsonl. Empty for none.
        work: Folder for what is written on the way; what is written is removed. Empty for the
            system's folder for such things.
        quick: See in a minute that everything runs: tiny sizes, whatever the options below say.
        settings: What is measured.
        sizes: How much is measured.
    """
    from carryon.cache.base.model import load_base
    from carryon.cache.settings import ForwardSettings
    from carryon.tools.bench.command import get_measurement, run_measurements
    from carryon.tools.bench.compose_job import ComposeJob

    base = load_base(settings.base, forward=ForwardSettings())
    chosen = QUICK_COMPOSE if quick else sizes

    def measure(name: str, scratch: Path, report: Callable[..., None]) -> None:
        job = ComposeJob(base=base, sizes=chosen, work=scratch, report=report)
        get_measurement(FIGURES[name])(job)

    names = [name for name in FIGURES if name in settings.figures]
    return [figure.to_dict() for figure in run_measurements(names, measure, out=out, work=work)]
