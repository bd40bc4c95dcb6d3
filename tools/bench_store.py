"""`carryon bench store`: how small and how fast stores are, beside other layouts."""

import json
import tempfile
from pathlib import Path
from typing import Any

from carryon.tools.bench_settings import QUICK, BenchSettings, BenchSizes


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
        carryon bench store --base demo/base --store gsm=demo/store --corpus python

    Args:
        out: Folder for figures.jsonl and plots. Empty for none.
        work: Folder for what is written on the way, on the disk that is to be measured; what is
            written is removed. Empty for the system's folder for such things.
        quick: See in a minute that everything runs: tiny sizes, whatever the options below say.
        settings: What is measured.
        sizes: How much is measured.
    """
    from carryon.cache.atomic import write_file
    from carryon.tools.bench_figure import Figure, print_json, print_table
    from carryon.tools.bench_plot import plot_streaming
    from carryon.tools.bench_run import run_benchmarks

    found: list[Figure] = []

    def report(figure: Figure) -> None:
        found.append(figure)
        print_json(figure)

    if work:
        Path(work).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="carryon-bench-", dir=work or None) as scratch:
        run_benchmarks(settings, QUICK if quick else sizes, Path(scratch), report=report)
    print_table(found)
    documents = [figure.to_dict() for figure in found]
    if out:
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        write_file(Path(out) / "figures.jsonl", lines.encode())
        plot_streaming(found, Path(out))
    return documents
