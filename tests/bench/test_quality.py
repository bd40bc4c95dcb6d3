"""Copies of stores in lossy profiles, shapes of equal size, and benchmarks of quality."""

from pathlib import Path

import numpy as np
import pytest
from support.benchmarks import measure, names_of
from support.tiny_train_stores import make_tiny_store

from carryon.cache.base.lm_head import widen
from carryon.cache.errors import InputError
from carryon.cache.format.quantization import STEPS, from_codes, to_codes
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify
from carryon.tools.bench.recode import recode_store
from carryon.tools.compare.methods import same_size
from carryon.train.config import CarryOnSettings, OptimizationSettings, TrainSettings
from carryon.train.data.datasets import open_data
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.carryon import num_parameters
from carryon.train.settings_file import PRESETS


@pytest.mark.parametrize("profile", list(STEPS))
def test_a_copy_holds_the_same_samples_and_the_states_of_its_profile(
    tmp_path: Path, profile: str
) -> None:
    store = Store.open(make_tiny_store(tmp_path / "store", taps=("layer.1", "final")))

    copy = recode_store(store, tmp_path / "copy", profile=profile)

    assert verify(tmp_path / "copy", depth="full").is_sound
    assert copy.manifest.base == store.manifest.base
    np.testing.assert_array_equal(copy.sample_held_out, store.sample_held_out)
    for ours, theirs in zip(copy.iter_units(), store.iter_units(), strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        for tap, bits in theirs.hidden.items():
            expected = from_codes(to_codes(widen(bits), step=STEPS[profile]))
            np.testing.assert_array_equal(ours.hidden[tap], expected)
    assert [copy.sample_id(0), copy.sample_id(5)] == [store.sample_id(0), store.sample_id(5)]


def test_a_copy_is_split_and_read_as_the_original_is(tmp_path: Path) -> None:
    store = Store.open(make_tiny_store(tmp_path / "store"))
    copy = recode_store(store, tmp_path / "copy", profile="near")
    settings = OptimizationSettings(epochs=2, tokens_per_step=64)
    ours, theirs = (
        open_data([str(each.root)], TrainSettings.from_options(window_units=2))
        for each in (copy, store)
    )
    assert copy.fingerprint != store.fingerprint
    np.testing.assert_array_equal(ours.split.held_out, theirs.split.held_out)
    for one, other in zip(ours.plan(settings), theirs.plan(settings), strict=True):
        assert [w.units for w in one] == [w.units for w in other]
        assert [[b.tolist() for b in step] for w in one for step in w.steps] == [
            [b.tolist() for b in step] for w in other for step in w.steps
        ]


def test_only_an_exact_store_is_copied(tmp_path: Path) -> None:
    store = Store.open(make_tiny_store(tmp_path / "store", profile="near"))
    with pytest.raises(InputError, match="expected a store of exact bfloat16 states"):
        recode_store(store, tmp_path / "copy", profile="compact")


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


def test_a_sampled_softmax_is_compared_with_the_exact_loss(tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store", vocab_size=1000)

    figures = measure("train.sampled", tmp_path, given_stores=[str(store)], sizes={"sampled": 100})

    assert names_of(figures) == ["sampled.speed", "sampled.nll"]
    details = figures[1].details
    assert len(set(details["held_out_nll"]) | set(details["held_out_nll_exact"])) == 6
    assert max(details["held_out_nll_exact"]) < details["base_nll"]
