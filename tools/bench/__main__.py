"""Benchmarks and experiments, run from a checkout: `python -m carryon.tools.bench NAME`."""

import sys
from collections.abc import Sequence

from carryon.tools.bench.experiments import EXPERIMENTS
from carryon.tools.bench.registry import BENCHMARKS, list_groups
from carryon.tools.cli.program import Program
from carryon.tools.cli.table import format_table

_NAMED = [*list_groups(), *BENCHMARKS]
BENCH = Program(
    prog="python -m carryon.tools.bench",
    about="Measure Carry-On. Each figure is one JSON line with its target.",
    closing="python -m carryon.tools.bench NAME --help explains its options.",
    commands=dict.fromkeys(_NAMED, "carryon.tools.bench.run:run_named")
    | {name: f"carryon.tools.bench.{each.place}" for name, each in EXPERIMENTS.items()},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark, a group or an experiment, or list them; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] in BENCHMARKS and {"-h", "--help"} & set(words):
        from carryon.tools.bench.run import describe  # which imports torch

        print(describe(words[0]))
    if words[0] in _NAMED:
        words.insert(1, words[0])  # they share one function, whose first argument is the name
    return BENCH.main(words)


def overview() -> str:
    """Return all names with one line each."""
    rows = [("name", "needs", "measures")]
    rows += [(name, each.needs, each.about) for name, each in (BENCHMARKS | EXPERIMENTS).items()]
    return "\n".join(
        [
            f"usage: {BENCH.prog} NAME [options]",
            "",
            f"{BENCH.about} NAME is a group ({', '.join(list_groups())}) or one of:",
            "",
            format_table(rows),
            "",
            BENCH.closing,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
