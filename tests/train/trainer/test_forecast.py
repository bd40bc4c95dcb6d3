"""What a run says of its own duration after its first steps, and that it changes nothing."""

import logging
import re
from pathlib import Path

import pytest
from support.tiny_runs import (
    TINY,
    Killed,
    assert_same_bits,
    kill_at,
    metrics_without_times,
    train_tiny,
)
from support.tiny_train_stores import make_tiny_store

from carryon.train.losses import sampled_gain, sampled_softmax
from carryon.train.trainer import engine
from carryon.train.trainer.sweep import sweep

LINE = re.compile(
    r"(\S+|\d runs): about ([\d.,]+ (?:s|min|h)) for (\d+) steps( that are left)?"
    r"(, evaluations included)?"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny store."""
    return make_tiny_store(tmp_path_factory.mktemp("forecast") / "store")


@pytest.fixture
def _hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say what a sampled softmax would do, of any run over a tiny vocabulary."""
    monkeypatch.setattr(engine, "HINT_S", 0.0)
    monkeypatch.setattr(engine, "HINT_RATIO", 0.0)
    monkeypatch.setattr(sampled_gain, "NUM_SAMPLED", 4)
    monkeypatch.setattr(sampled_softmax, "MOST_FREQUENT", 8)


def said(caplog: pytest.LogCaptureFixture) -> list[re.Match[str]]:
    """Return the lines of durations."""
    return [found for line in caplog.messages if (found := LINE.fullmatch(line))]


def test_a_run_says_its_duration_once_after_ten_steps(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    report = train_tiny(store, tmp_path / "run", epochs=8)
    [line] = said(caplog)
    assert line[1] == str(tmp_path / "run")
    assert int(line[3]) == report.num_steps > 40
    assert not line[4]
    assert line[5]
    assert "sampled-softmax" not in caplog.text


def test_a_short_run_and_one_that_is_quiet_say_nothing(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    train_tiny(store, tmp_path / "run", epochs=1)
    assert not said(caplog)


@pytest.mark.usefixtures("_hints")
def test_predictions_change_no_bit(
    store: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a run with dropout, which draws random numbers."""
    caplog.set_level(logging.INFO)
    train_tiny(store, tmp_path / "said", epochs=4, dropout=0.2)
    [hint] = [line for line in caplog.messages if "with --sampled-softmax" in line]
    assert re.search(r"exact loss over 64 tokens takes \d+% of a step: about \S+ s of steps", hint)
    assert re.search(r"they would take about [\d.]+ s\. Training losses", hint)
    monkeypatch.setattr(engine, "awaited_steps", lambda left: 0)
    train_tiny(store, tmp_path / "quiet", epochs=4, dropout=0.2)
    assert len(said(caplog)) == 1
    assert_same_bits(tmp_path / "said", tmp_path / "quiet")
    assert metrics_without_times(tmp_path / "said") == metrics_without_times(tmp_path / "quiet")


@pytest.mark.usefixtures("_hints")
def test_a_resumed_run_says_what_is_left_and_measures_no_other_loss(
    store: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            train_tiny(store, tmp_path / "run", epochs=8)
    caplog.set_level(logging.INFO)
    caplog.clear()
    report = train_tiny(store, tmp_path / "run", epochs=8)
    [line] = said(caplog)
    assert line[4]
    assert int(line[3]) == report.num_steps - 4 - 10
    assert "sampled-softmax" not in caplog.text


@pytest.mark.usefixtures("_hints")
@pytest.mark.parametrize(
    "changes", [{"sampled_softmax": 4}, {"kl_weight": 0.1}], ids=lambda changes: next(iter(changes))
)
def test_a_run_that_samples_or_needs_all_tokens_has_no_hint(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, float]
) -> None:
    caplog.set_level(logging.INFO)
    train_tiny(store, tmp_path / "run", epochs=4, **changes)
    assert len(said(caplog)) == 1
    assert "with --sampled-softmax" not in caplog.text


def test_runs_side_by_side_say_the_duration_of_all(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    vary = {"learning_rate": [0.01, 0.02]}
    sweep([str(store)], out=tmp_path / "sweep", vary=vary, settings=TINY.with_options(epochs=4))
    [line] = said(caplog)
    assert line[0].startswith("2 runs: about ")
