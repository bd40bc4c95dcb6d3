"""Benchmarks and experiments, run from a checkout: `python -m carryon.tools.bench NAME`."""

import sys
from collections.abc import Sequence
from typing import Any

from carryon.tools.bench.experiments import EXPERIMENTS
from carryon.tools.bench.registry import BENCHMARKS, list_groups
from carryon.tools.cli.program import Program
from carryon.tools.cli.table import format_table

_NAMED = [*list_groups(), *BENCHMARKS]


class _Benchmarks(Program):
    """Commands of which all but experiments share one function; its first argument is the name."""

    def call(self, name: str, argv: Sequence[str]) -> Any:  # noqa: ANN401 -- each has its own
        if name not in _NAMED:
            return Program.call(self, name, argv)
        if name in BENCHMARKS and {"-h", "--help"} & set(argv):
            from carryon.tools.bench.run import describe  # which imports torch

            print(describe(name))
        return Program.call(self, name, [name, *argv])

    def overview(self) -> str:
        rows = [("name", "needs", "measures")]
        rows += [
            (name, each.needs, each.about) for name, each in (BENCHMARKS | EXPERIMENTS).items()
        ]
        return "\n".join(
            [
                f"usage: {self.prog} NAME [options]",
                "",
                f"{self.about} NAME is a group ({', '.join(list_groups())}) or one of:",
                "",
                format_table(rows),
                "",
                self.closing,
            ]
        )


BENCH = _Benchmarks(
    prog="python -m carryon.tools.bench",
    about="Measure Carry-On. Each figure is one JSON line with its target.",
    closing="python -m carryon.tools.bench NAME --help explains its options.",
    commands=dict.fromkeys(_NAMED, "carryon.tools.bench.run:run_named")
    | {name: f"carryon.tools.bench.{each.place}" for name, each in EXPERIMENTS.items()},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark, a group or an experiment, or list them; return the exit code."""
    return BENCH.main(argv)


if __name__ == "__main__":
    sys.exit(main())
