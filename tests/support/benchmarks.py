"""Running a benchmark on tiny sizes."""

from pathlib import Path
from typing import Any

from carryon.tools.bench.job import Job
from carryon.tools.bench.run import read_sizes, run
from carryon.tools.compare.figure import Figure


def measure(
    name: str,
    work: Path,
    *,
    sizes: dict[str, Any] | None = None,
    **job: Any,  # noqa: ANN401 -- fields of Job
) -> list[Figure]:
    """Run a benchmark with its quick sizes, changed by `sizes`, and return its figures."""
    figures: list[Figure] = []
    values = read_sizes(name, [], is_quick=True) | (sizes or {})
    run(name, Job(work=work, add=figures.append, is_quick=True, **job), values)
    return figures


def names_of(figures: list[Figure]) -> list[str]:
    """Return the names of figures."""
    return [figure.figure for figure in figures]
