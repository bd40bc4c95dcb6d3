"""Benchmarks and experiments, run from a checkout: `python -m carryon.tools.bench NAME`."""

import sys

from carryon.tools.cli.program import Program

BENCH = Program(
    prog="python -m carryon.tools.bench",
    about="Measure Carry-On. Each figure is one JSON line with its target.",
    closing="python -m carryon.tools.bench NAME --help explains its options.",
    commands={
        "store": "carryon.tools.bench.store:bench_store",
        "train": "carryon.tools.bench.train:bench_train",
        "compose": "carryon.tools.bench.compose:bench_compose",
        "merge": "carryon.tools.bench.merge:bench_merge",
        "before": "carryon.tools.bench.before:bench_before",
        "house": "carryon.tools.bench.house:bench_house",
        "paths": "carryon.tools.bench.paths:bench_paths",
        "experiment-paths": "carryon.tools.bench.experiment_paths:experiment_paths",
        "experiment-cot": "carryon.tools.bench.experiment_cot:experiment_cot",
    },
)

if __name__ == "__main__":
    sys.exit(BENCH.main())
