"""Training killed at any instant: the same call again ends with the bits of one never killed."""

import random
import shutil
import time
from pathlib import Path

import pytest
from support.tiny_runs import RUNS, assert_same_bits, begin, metrics_without_times
from support.tiny_train_stores import make_tiny_store


@pytest.mark.slow
def test_a_run_killed_at_random_instants_ends_with_the_bits_of_one_never_killed(
    store_tmp: Path, request: pytest.FixtureRequest
) -> None:
    survive_kills(store_tmp, request, is_sweep=False)


@pytest.mark.slow
def test_a_sweep_killed_at_random_instants_ends_with_the_bits_of_one_never_killed(
    store_tmp: Path, request: pytest.FixtureRequest
) -> None:
    survive_kills(store_tmp, request, is_sweep=True)


def survive_kills(folder: Path, request: pytest.FixtureRequest, *, is_sweep: bool) -> None:
    rounds = request.config.getoption("--kill-rounds")
    store = make_tiny_store(folder / "store")
    started_at = time.perf_counter()
    begin(store, folder / "whole", is_sweep=is_sweep).join()
    longest_s = time.perf_counter() - started_at
    picks = random.Random(rounds)
    num_landed = 0
    while num_landed < rounds:
        out = folder / "killed"
        process = begin(store, out, is_sweep=is_sweep)
        process.join(picks.uniform(0.0, longest_s))
        if process.exitcode is None:
            num_landed += 1
        process.kill()
        process.join()
        last = begin(store, out, is_sweep=is_sweep)
        last.join()
        assert last.exitcode == 0
        for name in RUNS if is_sweep else ("",):
            assert_same_bits(out / name, folder / "whole" / name)
            actual, expected = (
                metrics_without_times(root / name) for root in (out, folder / "whole")
            )
            assert actual == expected
        assert not list(out.rglob("*.partial"))
        shutil.rmtree(out)
    print(f"{num_landed} of {rounds} kills while the training ran were survived")
