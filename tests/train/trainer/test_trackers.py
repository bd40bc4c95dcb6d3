"""The metrics of a run also reach a tracker."""

import shutil
import sys
from pathlib import Path

import pytest
from support.tiny_runs import train_tiny
from support.tiny_train_stores import make_tiny_store

from carryon.cache.errors import DamagedStoreError, MissingExtraError
from carryon.train.trainer import finish
from carryon.train.trainer.metrics import read_metrics


@pytest.fixture(autouse=True)
def without_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "plot_curves", lambda metrics, path: False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_every_number_of_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store = make_tiny_store(tmp_path / "store")
    train_tiny(store, tmp_path / "run", tracker="tensorboard")

    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for key in ("loss", "learning_rate", "held_out_nll", "tokens_per_second"):
        written = {line["step"]: line[key] for line in lines if key in line}
        logged = {event.step: event.value for event in events.Scalars(key)}
        assert logged == pytest.approx(written, rel=1e-5)


def test_a_tracker_that_is_not_installed_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    store = make_tiny_store(tmp_path / "store")

    with pytest.raises(MissingExtraError, match=r'pip install "gpt-carry-on\[wandb\]"'):
        train_tiny(store, tmp_path / "run", tracker="wandb")


def test_a_store_without_head_is_refused(tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store")
    shutil.rmtree(store / "head" / "lm_head")

    with pytest.raises(DamagedStoreError, match="head/lm_head"):
        train_tiny(store, tmp_path / "run")

    assert not (tmp_path / "run").exists()
