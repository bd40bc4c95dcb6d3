"""Shapes of equal size, and benchmarks of quality."""

from pathlib import Path

import pytest
from support.benchmarks import measure, names_of
from support.tiny_train_stores import make_tiny_store

from carryon.tools.compare.methods import same_size
from carryon.train.config import CarryOnSettings
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.carryon import num_parameters
from carryon.train.settings_file import PRESETS


@pytest.mark.parametrize("taps", [["final", "layer.1"], ["final", "layer.9", "layer.1"]])
def test_more_taps_take_no_more_weights(taps: list[str]) -> None:
    one = CarryOnSettings()
    several = same_size(one, taps=taps, base_width=576)
    sizes = [num_parameters(build_bottleneck(s, base_width=576, seed=0)) for s in (one, several)]
    assert several.taps == taps
    assert 0.98 * sizes[0] < sizes[1] <= sizes[0]


def test_every_preset_is_measured_after_one_epoch_and_after_all(tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store")

    figures = measure("train.presets", tmp_path, given_stores=[str(store)], sizes={"epochs": 2})

    epochs = {figure.figure: figure.details["epochs"] for figure in figures}
    assert epochs == {f"preset.{name}.epochs_{n}": n for n in (1, 2) for name in PRESETS}
    sizes = [figure.details["megabytes"] for figure in figures[: len(PRESETS)]]
    assert sizes == sorted(set(sizes))


def test_a_sampled_softmax_is_compared_at_equal_steps_and_at_equal_seconds(tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store", vocab_size=1000)

    figures = measure("train.sampled", tmp_path, given_stores=[str(store)], sizes={"sampled": 100})

    names = ("speed", "equal_steps", "equal_seconds")
    assert names_of(figures) == [f"sampled.store.{name}" for name in names]
    steps, seconds = figures[1].details, figures[2].details
    assert len({*steps["held_out_nll"], *steps["held_out_nll_exact"]}) == 6
    assert max(steps["held_out_nll_exact"]) < steps["base_nll"]
    assert seconds["steps"] == steps["steps"] * seconds["epochs"] // steps["epochs"]
    assert figures[2].value == sum(difference < 0 for difference in seconds["differences"])


def test_proposals_of_negatives_are_compared_by_their_gradient(tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store", vocab_size=1000)

    figures = measure("train.proposals", tmp_path, given_stores=[str(store)], sizes={"draws": 40})

    names = ["uniform", "unigram", "log_uniform", "scored_uniform", "scored"]
    assert names_of(figures) == [f"proposal.store.{name}" for name in names]
    for figure in figures:
        assert 0 < figure.details["bias"] < figure.value < 1
        assert 128 < figure.details["rows"] < 500
