"""Several processes train as one does, to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from support.tiny_runs import saved_weights, train_tiny
from support.tiny_train_stores import make_tiny_store

from carryon.train.trainer import finish
from carryon.train.trainer.metrics import read_metrics

OPTIONS = [
    *("--width", "8", "--blocks", "1", "--heads", "2", "--intermediate-size", "8"),
    *("--tokens-per-step", "40", "--learning-rate", "0.02", "--window-units", "2"),
    *("--device", "cpu", "--checkpoint-every", "4", "--log-every", "2"),
    *("--epochs", "2", "--saved-dtype", "float32", "--head-dtype", "float32"),
]


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_resumes_the_run_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "plot_curves", lambda metrics, path: False)
    store = make_tiny_store(tmp_path / "store")
    alone = train_tiny(store, tmp_path / "one", saved_dtype="float32", head_dtype="float32")

    launch(store, tmp_path / "two")

    lines = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [
        line["step"] for line in read_metrics(tmp_path / "one" / "metrics.jsonl")
    ]
    steps = [line for line in lines if "loss" in line]
    assert (steps[-1]["tokens"], steps[-1]["targets"]) == (alone.num_tokens, alone.num_targets)
    assert_close(tmp_path / "two", tmp_path / "one")
    assert lines[-1]["held_out_nll"] == pytest.approx(alone.carryon_nll, rel=1e-3)

    rewind_to(tmp_path / "two", tmp_path / "one", to="step-00000008")
    train_tiny(store, tmp_path / "two", saved_dtype="float32", head_dtype="float32")

    assert_close(tmp_path / "two", tmp_path / "one")
    sessions = read_metrics(tmp_path / "two" / "sessions.jsonl")
    assert [session["processes"] for session in sessions] == ["2", "1"]


MEASURED = """
import os
from carryon.train.losses import calibration
calibration.SMALLEST_HEAD = 1
calibration.choose = lambda seconds: "shifted" if os.environ["RANK"] == "0" else "plain"
"""
"""A program in whose processes other ways of the loss are the fastest."""


@pytest.mark.slow
def test_all_processes_have_the_way_of_the_loss_that_the_first_one_measured(tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store")
    launch(store, tmp_path / "measured", prelude=MEASURED)
    launch(store, tmp_path / "given", "--loss-way", "shifted")
    launch(store, tmp_path / "other", "--loss-way", "plain")

    for name in ("measured", "given"):
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert config["loss_way"] == "shifted"
    measured, given, other = (
        saved_weights(tmp_path / name) for name in ("measured", "given", "other")
    )
    assert all(torch.equal(measured[name], given[name]) for name in given)
    assert any(not torch.equal(other[name], given[name]) for name in given)


def launch(store: Path, out: Path, *options: str, prelude: str = "") -> None:
    """Train with two processes, as torchrun starts them."""
    program = "import sys; from carryon.tools.cli.main import main; sys.exit(main())"
    (out.parent / "carryon_main.py").write_text(f"{prelude}\n{program}")
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(out.parent / "carryon_main.py"), "train", "--store", str(store), "--out", str(out)]
        + [*OPTIONS, *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
        timeout=120,
    )


def rewind_to(out: Path, other: Path, *, to: str) -> None:
    """Make a finished run one that was killed after a checkpoint."""
    import shutil

    (out / "result.json").unlink()
    shutil.rmtree(out / "carryon")
    for path in (out / "checkpoints").glob("step-*"):
        if path.name > to:
            shutil.rmtree(path)
    assert (out / "checkpoints" / to).exists()


def assert_close(actual: Path, expected: Path) -> None:
    for name, weight in saved_weights(actual).items():
        torch.testing.assert_close(
            weight, saved_weights(expected)[name], rtol=1e-2, atol=1e-3, msg=name
        )
