"""How small and how fast stores are, beside other layouts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from carryon.tools.bench.settings import QUICK, BenchSettings, BenchSizes


def bench_store(
    *,
    out: str = "",
    work: str = "",
    quick: bool = False,
    settings: BenchSettings,
    sizes: BenchSizes,
) -> list[dict[str, Any]]:
    """Measure stores: bytes, errors, and speed beside the layouts of other projects.

    Speeds are compared side by side: the same samples, in one process, in turn, medians of several
    rounds. One JSON line for each figure goes to stdout as soon as it is known, a table to stderr
    at the end. A target that is missed reads "met": false; the exit code stays 0.

    Streaming, decoding, writing and opening are measured on made-up states and need nothing.
    Sizes, errors, and streaming and decoding of real states need --store or --base; extraction
    needs --base.

    Example:
        python -m carryon.tools.bench store --base demo/base --store gsm=demo/store --corpus python

    Args:
        out: Folder for figures.jsonl and plots. Empty for none.
        work: Folder for what is written on the way, on the disk that is to be measured; what is
            written is removed. Empty for the system's folder for such things.
        quick: See in a minute that everything runs: tiny sizes, whatever the options below say.
        settings: What is measured.
        sizes: How much is measured.
    """
    from carryon.tools.bench.command import run_measurements
    from carryon.tools.bench.plot import plot_streaming
    from carryon.tools.bench.run import run_benchmarks

    def measure(name: str, scratch: Path, report: Callable[..., None]) -> None:
        run_benchmarks(settings, QUICK if quick else sizes, scratch, report=report)

    found = run_measurements(["store"], measure, out=out, work=work)
    if out:
        plot_streaming(found, Path(out))
    return [figure.to_dict() for figure in found]
