"""Several processes train as one does, to rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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


def launch(store: Path, out: Path) -> None:
    """Train with two processes, as torchrun starts them."""
    program = "import sys; from carryon.tools.cli.main import main; sys.exit(main())"
    (out.parent / "carryon_main.py").write_text(program)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(out.parent / "carryon_main.py"), "train", "--store", str(store), "--out", str(out)]
        + OPTIONS,
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
