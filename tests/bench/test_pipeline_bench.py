"""The benchmarks of the extraction pipeline, on tiny sizes; no speed is asserted."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.benchmarks import measure, names_of

from carryon.cache.base.hooks import capture
from carryon.tools.bench.made_base import costless_base


def test_a_costless_base_hands_out_states_that_are_there() -> None:
    states = torch.arange(400, dtype=torch.float32).reshape(100, 4)
    base = costless_base(states)
    for _ in range(2):
        found = capture(base, ["final"], torch.zeros(3, 5, dtype=torch.int64))["final"]
        assert found.shape == (3, 5, 4)
        first = int(found[0, 0, 0]) // 4
        assert torch.equal(found.reshape(15, 4), states[first : first + 15])


@pytest.mark.slow
def test_the_pipeline_is_measured_on_one_core_and_on_two(store_tmp: Path) -> None:
    figures = measure("store.pipeline", store_tmp)
    ways = ["speed", "pool", "workers"] if len(os.sched_getaffinity(0)) > 1 else ["speed"]
    assert names_of(figures) == [f"pipeline.{way}" for way in ways]
    for figure in figures:
        assert np.isfinite(figure.value)
        for run in figure.details["runs"]:
            assert set(run["limit"]) <= {"read", "forward", "encode", "write"}


@pytest.mark.slow
def test_extraction_is_measured_with_random_bases_on_any_device(store_tmp: Path) -> None:
    """Without compiling, for which there is no time left."""
    sizes = {"device": "cpu", "rounds": 1, "max_tokens": 256, "mean_tokens": 64, "budget_s": 0.01}
    [figure] = measure("gpu.extract", store_tmp, sizes=sizes)
    assert figure.figure == "gpu.extract.64"
    assert figure.value > 0
    assert figure.details["units"] >= 4
