"""Runs, carry-ons and lineages that were begun when a softmax weighed several taps keep it."""

import logging
from pathlib import Path

import pytest
from support.tiny_runs import TINY, Killed, assert_same_bits, kill_at, saved_weights, train_tiny
from support.tiny_train_stores import make_tiny_store

from carryon.cache.files.documents import read_sealed, sealed, write_json
from carryon.train.continual.lineage import update
from carryon.train.continual.lineage_dir import open_lineage
from carryon.train.modules.serialization import load_carryon
from carryon.train.saved_settings import with_current_names

TAPS = ["final", "layer.1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny store of two taps."""
    return make_tiny_store(tmp_path_factory.mktemp("taps") / "store", taps=TAPS)


def _forget(path: Path, group: str) -> None:
    """Write a document as it was before the setting existed."""
    document = read_sealed(path)
    del document[group]["tap_mixing"]
    write_json(path, sealed(document))


def test_a_new_run_has_its_taps_side_by_side(store: Path, tmp_path: Path) -> None:
    train_tiny(store, tmp_path / "run", taps=TAPS)
    assert not any("mixer" in name for name in saved_weights(tmp_path / "run"))


def test_a_run_from_before_resumes_as_it_began(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    train_tiny(store, whole, taps=TAPS, tap_mixing="softmax", epochs=3)
    with monkeypatch.context() as patch:
        kill_at(patch, 9)
        with pytest.raises(Killed):
            train_tiny(store, run, taps=TAPS, tap_mixing="softmax", epochs=3)
    _forget(run / "run.json", "identity")
    caplog.set_level(logging.INFO)

    train_tiny(store, run, taps=TAPS, epochs=3)

    assert_same_bits(run, whole)
    assert "the run began with --tap-mixing softmax and keeps it" in caplog.text


def test_a_carryon_from_before_opens(store: Path, tmp_path: Path) -> None:
    train_tiny(store, tmp_path / "run", taps=TAPS, tap_mixing="softmax")
    folder = tmp_path / "run" / "carryon"
    _forget(folder / "carryon.json", "settings")

    carryon, card = load_carryon(folder)

    assert carryon.settings.tap_mixing == "softmax"
    assert card.settings["tap_mixing"] == "softmax"


def test_a_lineage_from_before_goes_on_as_it_began(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "lineage"
    more = make_tiny_store(tmp_path / "more", taps=TAPS, samples_seed=1)
    settings = TINY.with_options(taps=TAPS, min_lr_ratio=0.1)
    softmax = settings.with_options(tap_mixing="softmax")
    update(lineage=root, store=[str(store)], settings=softmax)
    _forget(root / "lineage.json", "settings")
    caplog.set_level(logging.INFO)

    update(lineage=root, store=[str(more)], settings=settings)

    assert open_lineage(root).settings["tap_mixing"] == "softmax"
    assert "the lineage began with --tap-mixing softmax and keeps it" in caplog.text


def test_settings_of_ones_own_that_do_not_say_are_left_as_they_are() -> None:
    assert with_current_names({"taps": TAPS, "width": 64}) == {"taps": TAPS, "width": 64}
