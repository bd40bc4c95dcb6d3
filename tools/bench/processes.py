"""Processes that start in a tenth of a second: forked from one that has imported everything."""

import multiprocessing
import sys
from functools import cache
from typing import Any

PRELOADED = [
    "carryon.tools.cli.main",
    "carryon.cache.extraction.pipeline",
    "carryon.cache.extraction.repair",
    "carryon.train.verify",
    "carryon.train.continual.lineage",
    "carryon.train.inference.merge",
    "carryon.train.trainer.sweep",
    "carryon.tools.commands.evaluate",
    "carryon.tools.commands.generate",
    "transformers.models.llama.modeling_llama",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "pandas",  # by pyarrow
    "torch._dynamo",  # by the first optimizer, for two seconds
    "zarr",
]


@cache
def processes() -> Any:  # noqa: ANN401 -- multiprocessing's contexts have no public type
    """Return multiprocessing's context whose processes have imported what commands import.

    All benchmarks and tests take this one: Python has one server of processes to fork, and the
    first that starts it decides what it has imported.
    """
    # Its keeper of semaphores names at its end those of processes that were killed.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context
