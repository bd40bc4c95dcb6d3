"""Runs that repeat and resume to the bit, and say what went wrong.

The store has 20 training samples in a few units; an epoch is 5 or 6 steps, so checkpoints every 4
steps fall into the middle of epochs.
"""

import json
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.tiny_runs import TINY, Killed, assert_same_bits, kill_at, train_tiny
from support.tiny_train_stores import make_tiny_store

from carryon.cache.device import HEAD_DTYPES
from carryon.cache.errors import InputError, MissingError
from carryon.cache.store.reader import Store
from carryon.train import StoreDataset, sweep, train
from carryon.train.inference.evaluate import evaluate
from carryon.train.modules.serialization import load_carryon
from carryon.train.trainer import finish
from carryon.train.trainer import run as run_module
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.step import take_step


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("loop") / "store")


@pytest.fixture(autouse=True)
def without_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "plot_curves", lambda metrics, path: False)


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainReport]:
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "plot_curves", lambda metrics, path: False)
        return out, train_tiny(store, out)


def test_a_run_lowers_the_held_out_nll(finished: tuple[Path, TrainReport]) -> None:
    _, report = finished

    assert report.carryon_nll < report.base_nll - 0.3
    assert report.held_out_samples == 4
    assert report.num_tokens == 2 * 176
    assert 0 <= report.data_wait_ratio <= 1


def test_a_run_writes_the_files_of_its_folder(finished: tuple[Path, TrainReport]) -> None:
    out, report = finished

    assert sorted(path.name for path in out.iterdir()) == [
        "carryon",
        "checkpoints",
        "config.yaml",
        "contamination.json",
        "metrics.jsonl",
        "result.json",
        "run.json",
        "sessions.jsonl",
    ]
    assert TrainReport.read(out / "result.json") == report
    assert report.carryon == str(out / "carryon")
    card = load_carryon(report.carryon)[1]
    assert card.figures["held_out_tokens"] == report.held_out_targets
    assert card.framing["kinds"] == {}
    steps = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    assert len(steps) == 3  # the last two, and the best
    last, best = (
        json.loads((out / "checkpoints" / name).read_text()) for name in ("last.json", "best.json")
    )
    assert last["folder"] == steps[-1] == f"step-{report.num_steps:08d}"
    assert best["folder"] == steps[0]


def test_the_config_is_flat_and_complete(store: Path, finished: tuple[Path, TrainReport]) -> None:
    out, _ = finished

    config = yaml.safe_load((out / "config.yaml").read_text())

    chosen = {"loss_way": "attention", "compile": False}  # for a small head, and for a CPU
    settings = TINY.to_flat() | chosen
    assert config["head_dtype"] in HEAD_DTYPES  # measured
    settings["head_dtype"] = config["head_dtype"]
    assert config == {"store": [str(store)], "out": str(out), **settings}


def test_metrics_begin_with_the_base_and_end_with_the_carryon(
    finished: tuple[Path, TrainReport],
) -> None:
    out, report = finished

    lines = read_metrics(out / "metrics.jsonl")
    evaluations = [line for line in lines if "held_out_nll" in line]

    assert evaluations[0] == {
        "step": 0,
        "epoch": 0,
        "held_out_nll": report.base_nll,
        "held_out_nll_se": report.base_nll_se,
        "held_out_targets": report.held_out_targets,
        "held_out_samples": report.held_out_samples,
    }
    assert evaluations[-1]["step"] == report.num_steps
    assert evaluations[-1]["held_out_nll"] == report.carryon_nll
    assert evaluations[-1]["held_out_nll_se"] == report.carryon_nll_se
    assert len(evaluations) == 3  # before, after the first epoch, at the end
    steps = [line for line in lines if "loss" in line]
    assert steps[-1]["tokens"] == report.num_tokens
    assert {"learning_rate", "grad_norm", "tokens_per_second", "data_wait_ratio"} <= set(steps[0])


def test_a_run_killed_before_its_result_is_written_records_the_result_once(
    store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(store, out=out, settings=TINY)
    lines = read_metrics(out / "metrics.jsonl")
    (out / "result.json").unlink()  # as a kill between the last line and this file leaves it

    train(store, out=out, settings=TINY)

    again = read_metrics(out / "metrics.jsonl")
    assert [line.get("held_out_nll") for line in again] == [
        line.get("held_out_nll") for line in lines
    ]


def test_evaluating_the_carryon_gives_the_figures_of_the_run(
    store: Path, finished: tuple[Path, TrainReport]
) -> None:
    _, report = finished

    measured = evaluate(store=str(store), carryon=report.carryon, device="cpu")

    assert measured.samples == "held-out"
    assert measured.base_nll == report.base_nll
    assert measured.carryon_nll == report.carryon_nll


def test_the_same_command_in_another_folder_gives_the_same_bits(
    store: Path, finished: tuple[Path, TrainReport], tmp_path: Path
) -> None:
    again = train_tiny(store, tmp_path / "again")

    assert_same_bits(tmp_path / "again", finished[0])
    assert again.carryon_nll == finished[1].carryon_nll


@pytest.mark.parametrize("step", [2, 5, 9])
def test_a_killed_run_resumes_to_the_same_bits(
    store: Path,
    finished: tuple[Path, TrainReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train_tiny(store, tmp_path / "run")

    report = train_tiny(store, tmp_path / "run")

    assert_same_bits(tmp_path / "run", finished[0])
    assert report.carryon_nll == finished[1].carryon_nll
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [line["step"] for line in read_metrics(finished[0] / "metrics.jsonl")]


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_resume(
    store: Path,
    finished: tuple[Path, TrainReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = iter(range(1000))

    def interrupted_step(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if next(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return take_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "take_step", interrupted_step)
        with pytest.raises(KeyboardInterrupt, match="after step 3 of .*Run the same command"):
            train_tiny(store, tmp_path / "run")
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert saved == ["step-00000003"]

    train_tiny(store, tmp_path / "run")

    assert_same_bits(tmp_path / "run", finished[0])


def test_smaller_batches_within_a_step_train_the_same_to_rounding(
    store: Path, finished: tuple[Path, TrainReport], tmp_path: Path
) -> None:
    # One window, so that the same samples could meet; the steps still differ, the result little.
    report = train_tiny(store, tmp_path / "run", micro_batch_tokens=13)

    assert report.num_tokens == finished[1].num_tokens
    assert abs(report.carryon_nll - finished[1].carryon_nll) < 1.0


def test_a_finished_run_returns_its_measured(
    store: Path, finished: tuple[Path, TrainReport], caplog: pytest.LogCaptureFixture
) -> None:
    out, report = finished
    caplog.set_level("INFO", logger="carryon")

    assert train_tiny(store, out) == report
    assert "this run is finished" in caplog.text


def test_a_run_with_other_settings_is_refused_with_both_values(
    store: Path, finished: tuple[Path, TrainReport]
) -> None:
    with pytest.raises(InputError, match="learning_rate is 0.02 there and 0.5 here"):
        train_tiny(store, finished[0], learning_rate=0.5)


def test_a_run_on_another_store_is_refused(
    finished: tuple[Path, TrainReport], tmp_path: Path
) -> None:
    other = make_tiny_store(tmp_path / "other", unit_tokens=32)

    with pytest.raises(InputError, match="store_fingerprint is '.*' there and '.*' here"):
        train_tiny(other, finished[0])


def test_settings_that_do_not_decide_the_result_may_change(
    store: Path, finished: tuple[Path, TrainReport]
) -> None:
    changes = {"checkpoint_every": 1, "log_every": 1, "keep_checkpoints": 5}

    assert train_tiny(store, finished[0], **changes) == finished[1]


def test_a_folder_that_holds_something_else_is_left_alone(store: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")

    with pytest.raises(InputError, match="expected an empty folder or a run"):
        train_tiny(store, tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "call",
    [
        partial(train, []),
        partial(sweep, [], vary=["seed=0,1"]),
        lambda out: StoreDataset([]),
    ],
)
def test_a_call_without_a_store_is_refused(call: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="store: expected one folder or more, got none"):
        call(out=tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_an_open_store_is_trained_on(store: Path, tmp_path: Path) -> None:
    report = train(Store.open(store), out=tmp_path / "run", settings=TINY)

    assert report == train_tiny(store, tmp_path / "run")


def test_a_store_that_cannot_be_split_leaves_no_folder(tmp_path: Path) -> None:
    one = make_tiny_store(tmp_path / "one", num_samples=1, num_held_out=0)

    with pytest.raises(InputError, match="has 1 samples, 0 of them held out"):
        train_tiny(one, tmp_path / "run")

    assert not (tmp_path / "run").exists()


def test_a_missing_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no-store"):
        train_tiny(tmp_path / "no-store", tmp_path / "run")

    assert not (tmp_path / "run").exists()


def test_a_tap_that_was_not_stored_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the taps final, layer.3, got final"):
        train_tiny(store, tmp_path / "run", taps=["layer.3"])

    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(
    store: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"expected a finite loss .* in the samples sample-\d+"):
        train_tiny(store, tmp_path / "run", learning_rate=1e38, grad_clip=0.0)

    assert not (tmp_path / "run" / "result.json").exists()
