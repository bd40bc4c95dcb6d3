"""What a run says of its own duration after its first steps, and that it changes nothing."""

import logging
import re
from pathlib import Path
from typing import Any

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
from torch import Tensor

from carryon.train.losses import sampled_gain, sampled_softmax
from carryon.train.trainer import engine
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.run import Job
from carryon.train.trainer.segment import Segment
from carryon.train.trainer.sweep import sweep
from carryon.train.trainer.trainer import train_jointly

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


def test_a_segment_says_the_duration_of_its_own_steps(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    segment = Segment(
        paradigm="wsd",
        version=1,
        ends=(30,),
        alpha=0.5,
        first=6,
        stop=30,
        offset=0,
        start=None,
    )
    settings = TINY.with_options(epochs=8)
    train_jointly(
        [str(store)], [Job(out=str(tmp_path / "run"), settings=settings, segment=segment)]
    )
    [line] = said(caplog)
    assert line[3] == "24"
    assert not line[4]


@pytest.fixture
def facts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is known of evaluations, where a token takes a second and a target of the loss three."""
    seen: list[dict[str, Any]] = []

    def measured(head: object, targets: Tensor, *, chunk: int, at_most_s: float) -> float:
        seen.append({"batch_s": at_most_s * len(targets)})
        return 3.0

    def known(**facts: Any) -> engine.Evaluations:  # noqa: ANN401
        seen[-1] |= facts
        return evaluations(**facts)

    evaluations = engine.Evaluations
    monkeypatch.setattr(engine, "seconds_per_token", lambda *args, **kwargs: 1.0)
    monkeypatch.setattr(engine, "evaluation_seconds", measured)
    monkeypatch.setattr(engine, "Evaluations", known)
    return seen


def test_an_evaluation_that_is_due_now_is_still_to_come(
    store: Path, tmp_path: Path, facts: list[dict[str, Any]]
) -> None:
    train_tiny(store, tmp_path / "run", epochs=8, evaluate_every=10)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    evaluated = [line["step"] for line in lines if "held_out_nll" in line]
    assert evaluated[:2] == [0, 10]
    [fact] = facts
    assert fact["left"] == len(evaluated) - 2  # without the base, and the last one of all samples


def test_several_processes_share_the_tokens_of_a_step_and_the_targets_of_an_evaluation(
    store: Path,
    tmp_path: Path,
    facts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forecast = engine._Forecast
    for number in (1, 2):
        monkeypatch.setattr(
            engine,
            "_Forecast",
            lambda states, num_processes, number=number: forecast(states, num_processes=number),
        )
        train_tiny(store, tmp_path / str(number), epochs=8)
    alone, both = facts
    assert both["batch_s"] == 2 * alone["batch_s"]
    assert (alone["target_s"], both["target_s"]) == (3.0, 1.5)
