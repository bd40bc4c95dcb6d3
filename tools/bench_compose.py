"""`carryon bench compose`: what a customized model costs beside its base, and that it is exact."""

import importlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from carryon.tools.bench_compose_settings import (
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
        carryon bench compose --base demo/base

    Args:
        out: Folder for figures.jsonl. Empty for none.
        work: Folder for what is written on the way; what is written is removed. Empty for the
            system's folder for such things.
        quick: See in a minute that everything runs: tiny sizes, whatever the options below say.
        settings: What is measured.
        sizes: How much is measured.
    """
    from carryon.cache.atomic import write_file
    from carryon.cache.base import load_base
    from carryon.cache.spec import ForwardSettings
    from carryon.tools.bench_compose_job import ComposeJob
    from carryon.tools.bench_figure import Figure, print_json, print_table

    found: list[Figure] = []

    def report(figure: Figure) -> None:
        found.append(figure)
        print_json(figure)

    if work:
        Path(work).mkdir(parents=True, exist_ok=True)
    base = load_base(settings.base, forward=ForwardSettings())
    for name in FIGURES:
        if name not in settings.figures:
            continue
        with tempfile.TemporaryDirectory(prefix="carryon-bench-", dir=work or None) as scratch:
            job = ComposeJob(
                base=base,
                sizes=QUICK_COMPOSE if quick else sizes,
                work=Path(scratch),
                report=report,
            )
            find_measurement(name)(job)
    print_table(found)
    documents = [figure.to_dict() for figure in found]
    if out:
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        write_file(Path(out) / "figures.jsonl", lines.encode())
    return documents


def find_measurement(figure: str) -> Callable[..., None]:
    """Return the function that measures `figure`; its file is imported only now."""
    module, _, function = FIGURES[figure].partition(":")
    measure: Callable[..., None] = getattr(
        importlib.import_module(f"carryon.tools.{module}"), function
    )
    return measure
