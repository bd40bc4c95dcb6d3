"""What a step draws, what follows it, and when a run ends."""

import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.tiny_runs import (
    TINY,
    Killed,
    assert_same_bits,
    kill_at,
    metrics_without_times,
    saved_weights,
    train_tiny,
)
from support.tiny_train_stores import make_tiny_store

from carryon.cache.errors import InputError
from carryon.tools.cli.main import call_command
from carryon.train import sweep
from carryon.train.data.evaluation_set import MIN_TARGETS
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.trainer import finish
from carryon.train.trainer import run as run_module
from carryon.train.trainer.checkpoint import START, Progress, load_weights
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.run_state import with_evaluation
from carryon.train.trainer.step import take_step


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("live") / "store", taps=("final", "layer.1"))


@pytest.fixture(autouse=True)
def without_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "plot_curves", lambda metrics, path: False)


def _evaluations(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(out / "metrics.jsonl") if "held_out_nll" in line]


def test_the_config_of_a_run_repeats_it_to_the_bit(store: Path, tmp_path: Path) -> None:
    train_tiny(store, tmp_path / "run", dropout=0.1, evaluate_every=3)
    config = str(tmp_path / "run" / "config.yaml")

    call_command("train", ["--config", config, "--out", str(tmp_path / "again")])

    assert_same_bits(tmp_path / "again", tmp_path / "run")
    assert metrics_without_times(tmp_path / "again") == metrics_without_times(tmp_path / "run")


def test_dropout_changes_the_training_and_not_the_evaluation(store: Path, tmp_path: Path) -> None:
    train_tiny(store, tmp_path / "none")
    report = train_tiny(store, tmp_path / "some", dropout=0.4)

    assert not torch.equal(
        saved_weights(tmp_path / "none")["up.weight"], saved_weights(tmp_path / "some")["up.weight"]
    )
    again = train_tiny(store, tmp_path / "again", dropout=0.4)
    assert again.carryon_nll == report.carryon_nll


@pytest.mark.parametrize("step", [3, 7])
def test_a_killed_run_with_dropout_resumes_to_the_same_bits(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    train_tiny(store, tmp_path / "whole", dropout=0.4)
    calls = iter(range(1000))

    def killed_step(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if next(calls) == step:
            raise SystemError("killed")
        return take_step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "take_step", killed_step)
        with pytest.raises(SystemError, match="killed"):
            train_tiny(store, tmp_path / "run", dropout=0.4)
    torch.manual_seed(5)  # whatever state the process is in

    train_tiny(store, tmp_path / "run", dropout=0.4)

    assert_same_bits(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_gets_no_better_ends_early_with_its_best_weights(
    store: Path, tmp_path: Path
) -> None:
    changes = {"learning_rate": 0.5, "schedule": "constant", "epochs": 20, "patience": 2}

    report = train_tiny(store, tmp_path / "run", saved_dtype="float32", **changes)

    evaluations = _evaluations(tmp_path / "run")[1:-1]
    best = min(evaluations, key=lambda line: line["held_out_nll"])
    assert evaluations.index(best) == len(evaluations) - 3  # two more, neither better
    assert report.num_steps == evaluations[-1]["step"] < 20 * 5
    assert report.finished_with_step == best["step"]
    assert _evaluations(tmp_path / "run")[-1]["of_step"] == best["step"]
    assert report.carryon_nll == best["held_out_nll"]
    kept = json.loads((tmp_path / "run" / "checkpoints" / "best.json").read_text())
    assert kept["folder"] == f"step-{best['step']:08d}"
    carryon = build_bottleneck(TINY.carryon, base_width=16, seed=1)
    load_weights(tmp_path / "run" / "checkpoints" / kept["folder"], carryon)
    for name, weight in saved_weights(tmp_path / "run").items():
        assert torch.equal(weight, carryon.state_dict()[name])


def test_a_run_may_end_with_its_best_weights_without_ending_early(
    store: Path, tmp_path: Path
) -> None:
    changes = {"learning_rate": 0.5, "schedule": "constant", "epochs": 6, "finish_with": "best"}

    report = train_tiny(store, tmp_path / "run", saved_dtype="float32", **changes)

    evaluations = _evaluations(tmp_path / "run")[1:-1]
    assert evaluations[-1]["step"] == report.num_steps  # the last step competes
    assert report.carryon_nll == min(line["held_out_nll"] for line in evaluations)


def test_evaluations_that_decide_the_result_may_not_change(store: Path, tmp_path: Path) -> None:
    train_tiny(store, tmp_path / "run", patience=3)

    with pytest.raises(InputError, match="evaluate_every is 0 there and 2 here"):
        train_tiny(store, tmp_path / "run", patience=3, evaluate_every=2)


def test_an_evaluation_that_is_not_better_is_counted() -> None:
    progress = START
    for step, nll in enumerate((2.0, 1.0, 1.0, 1.5), start=1):
        progress = with_evaluation(
            Progress(
                **{name: getattr(progress, name) for name in START.__slots__} | {"step": step}
            ),
            nll,
        )

    assert (progress.best_nll, progress.best_step) == (1.0, 2)
    assert progress.evaluations_since_best == 2


def test_metrics_tell_the_shares_of_several_taps(store: Path, tmp_path: Path) -> None:
    train_tiny(store, tmp_path / "run", taps=["final", "layer.1"])

    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in line]

    for line in lines:
        assert set(line["tap_ratios"]) == {"final", "layer.1"}
        assert sum(line["tap_ratios"].values()) == pytest.approx(1.0)
    assert lines[0]["tap_ratios"] != lines[-1]["tap_ratios"]


def test_each_beginning_is_recorded_and_another_version_said(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        raise SystemError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "take_step", stop)
        with pytest.raises(SystemError):
            train_tiny(store, tmp_path / "run")
    monkeypatch.setattr(
        "carryon.train.trainer.run_dir.library_versions", lambda: {"torch": "0.1", "threads": "9"}
    )
    train_tiny(store, tmp_path / "run")

    sessions = read_metrics(tmp_path / "run" / "sessions.jsonl")
    assert [session["step"] for session in sessions] == [0, 0]
    torch_version = version("torch")  # torch.__version__ may add the build
    assert sessions[0]["torch"] == torch_version
    assert sessions[1]["torch"] == "0.1"
    assert f"torch {torch_version} -> 0.1" in caplog.text


def test_memory_decides_how_many_units_are_shuffled_together(store: Path, tmp_path: Path) -> None:
    # A unit: 64 rows of width 16 in bfloat16, 2,048 bytes; two windows are in memory,
    # each with room for a quarter more.
    train_tiny(store, tmp_path / "run", window_units=4, host_memory_gb=12e-6)

    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert identity["window_units"] == 2
    train_tiny(store, tmp_path / "same", window_units=2, host_memory_gb=1.0)
    assert_same_bits(tmp_path / "same", tmp_path / "run")


def test_memory_for_less_than_two_units_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="host_memory_gb: expected 5.1e-06 or more"):
        train_tiny(store, tmp_path / "run", host_memory_gb=1e-6)

    assert not (tmp_path / "run").exists()


def test_a_store_without_a_supervised_token_is_refused(tmp_path: Path) -> None:
    make_tiny_store(tmp_path / "store", first_target=99)

    with pytest.raises(InputError, match="no supervised token in the samples to train on"):
        train_tiny(tmp_path / "store", tmp_path / "run")

    assert not (tmp_path / "run").exists()


def test_a_large_held_out_half_is_evaluated_in_part_on_the_way_and_whole_at_the_end(
    store_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = make_tiny_store(store_tmp / "store", num_samples=500, num_held_out=400, first_target=1)
    with caplog.at_level(logging.INFO, logger="carryon"):
        report = train_tiny(large, store_tmp / "run", finish_with="best", epochs=3)
        again = train_tiny(large, store_tmp / "again", finish_with="best", epochs=3)

    first, *during, last = _evaluations(store_tmp / "run")
    samples = first["held_out_samples"]
    assert MIN_TARGETS <= first["held_out_targets"] < report.held_out_targets / 2
    assert {line["held_out_samples"] for line in during} == {samples}
    assert len(during) == 3
    assert last["held_out_samples"] == report.held_out_samples == 400
    assert first["held_out_nll"] != report.base_nll
    best = min(during, key=lambda line: line["held_out_nll"])
    assert report.finished_with_step == best["step"]
    shown = f"step {best['step']}: held-out NLL {best['held_out_nll']:.4f} +- "
    assert f"{shown}{best['held_out_nll_se']:.4f} on" in caplog.text
    assert f"400 samples held out, {samples} of them evaluated during the run" in caplog.text
    assert 0 < report.evaluate_s < 60
    assert 0 < report.last_evaluate_s < 60
    assert again.carryon_nll == report.carryon_nll
    assert_same_bits(store_tmp / "again", store_tmp / "run")


def test_runs_side_by_side_evaluate_what_they_evaluate_alone(store_tmp: Path) -> None:
    large = make_tiny_store(store_tmp / "store", num_samples=900, num_held_out=800, first_target=1)
    runs: dict[str, dict[str, Any]] = {"few": {}, "many": {"kl_weight": 0.0, "epochs": 1}}
    runs["fixed"] = {"evaluate_tokens": 500}
    sweep(large, out=store_tmp / "sweep", settings=TINY, runs=runs)
    for name, changes in runs.items():
        train_tiny(large, store_tmp / name, **changes)
        alone, beside = _evaluations(store_tmp / name), _evaluations(store_tmp / "sweep" / name)
        assert alone == beside
    assert _evaluations(store_tmp / "fixed")[0]["held_out_targets"] < 500


@pytest.mark.parametrize("lost", ["", "config.yaml", "run.json"])
def test_a_run_from_before_resumes_with_its_own_number(
    store_tmp: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = make_tiny_store(store_tmp / "store", num_samples=300, num_held_out=200, first_target=1)
    given = {"finish_with": "best", "epochs": 3, "checkpoint_every": 2}
    whole = train_tiny(large, store_tmp / "whole", evaluate_tokens=65536, **given)
    with monkeypatch.context() as patch:
        kill_at(patch, 40)
        with pytest.raises(Killed):
            train_tiny(large, store_tmp / "run", evaluate_tokens=65536, **given)
    if lost:
        (store_tmp / "run" / lost).unlink()

    resumed = train_tiny(large, store_tmp / "run", **given)  # evaluate_tokens as today: chosen

    assert resumed.carryon_nll == whole.carryon_nll
    assert_same_bits(store_tmp / "run", store_tmp / "whole")
    assert _evaluations(store_tmp / "run") == _evaluations(store_tmp / "whole")
    assert _evaluations(store_tmp / "run")[0]["held_out_samples"] == 200
    config = yaml.safe_load((store_tmp / "run/config.yaml").read_text())
    assert config["evaluate_tokens"] == 65536


def test_a_run_whose_only_step_has_no_learning_rate_says_so(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one: dict[str, Any] = {"epochs": 1, "tokens_per_step": 1 << 20, "window_units": 99}
    report = train_tiny(store, tmp_path / "run", **one)
    assert report.num_steps == 1
    assert report.carryon_nll == report.base_nll
    assert caplog.text.count("every step has the learning rate 0") == 1
    caplog.clear()
    report = train_tiny(store, tmp_path / "other", min_lr_ratio=0.1, **one)
    assert report.carryon_nll != report.base_nll
    assert "every step" not in caplog.text
