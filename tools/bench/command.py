"""A benchmark as a command: its measurements one after another, each in a folder of its own.

Every figure is printed as soon as it is known, so that a run cut short keeps what it has.
"""

import importlib
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from carryon.cache.files import write_file
from carryon.tools.compare.figure import Figure, Report, print_json, print_table

Measure = Callable[[str, Path, Report], None]
"""Called with the name of a measurement, a folder for what it writes on the way (it is there, and
is removed afterwards), and what to call with each figure."""


def run_measurements(
    names: Iterable[str], measure: Measure, *, out: str, work: str
) -> list[Figure]:
    """Run measurements and return their figures; JSON lines go to stdout, a table to stderr.

    Args:
        names: of the measurements.
        measure: runs one.
        out: folder for figures.jsonl; empty for none.
        work: where the folders of measurements are made; empty for the system's place.
    """
    found: list[Figure] = []

    def report(figure: Figure) -> None:
        found.append(figure)
        print_json(figure)

    if work:
        Path(work).mkdir(parents=True, exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="carryon-bench-", dir=work or None) as scratch:
            measure(name, Path(scratch), report)
    print_table(found)
    if out:
        lines = "".join(json.dumps(figure.to_dict()) + "\n" for figure in found)
        write_file(Path(out) / "figures.jsonl", lines.encode())
    return found


def get_measurement(place: str) -> Callable[..., Any]:
    """Return the function at `file:function` of this folder; the file is imported only now."""
    module, _, function = place.partition(":")
    found: Callable[..., Any] = getattr(
        importlib.import_module(f"carryon.tools.bench.{module}"), function
    )
    return found
