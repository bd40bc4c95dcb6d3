"""Tiny training runs: settings, kills, and what their folders hold."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from carryon.tools.bench.processes import processes
from carryon.train.config import (
    CarryOnSettings,
    OptimizationSettings,
    RunSettings,
    StreamSettings,
    TrainSettings,
)
from carryon.train.continual.lineage import update
from carryon.train.trainer import finish
from carryon.train.trainer import run as run_module
from carryon.train.trainer import sweep as sweep_module
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.step import take_step
from carryon.train.trainer.sweep import sweep
from carryon.train.trainer.trainer import train

TINY = TrainSettings(
    carryon=CarryOnSettings(width=8, blocks=1, heads=2, intermediate_size=8),
    optimization=OptimizationSettings(epochs=2, tokens_per_step=40, learning_rate=0.02),
    stream=StreamSettings(window_units=2),
    run=RunSettings(device="cpu", checkpoint_every=4, log_every=2),
)
"""Two epochs of 5 or 6 steps over the store of `make_tiny_store`."""

KILLED: dict[str, Any] = {
    "epochs": 4,
    "checkpoint_every": 2,
    "evaluate_every": 3,
    "dropout": 0.2,
    "finish_with": "best",
    "head_dtype": "float32",
    "gradient_filter": 1e-2,
}
RUNS = {"slow": {"learning_rate": 0.01}, "seed": {"seed": 4}, "short": {"epochs": 2}}

TIMES = ("tokens_per_second", "targets_per_second", "data_wait_ratio", "elapsed_s")


def train_tiny(store: Path | Sequence[Path], out: Path, **changes: Any) -> TrainReport:  # noqa: ANN401
    """Train with the tiny settings, some of them changed by name."""
    return train(store, out=out, settings=TINY, **changes)


class Killed(Exception):
    """Stands for a kill between two steps."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the next training raise Killed before a step."""
    calls = iter(range(1000))

    def killed_step(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if next(calls) == step:
            raise Killed
        return take_step(*args, **kwargs)

    monkeypatch.setattr(run_module, "take_step", killed_step)


def saved_weights(out: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's finished carry-on."""
    return load_file(out / "carryon" / "carryon.safetensors")


def assert_same_bits(actual: Path, expected: Path) -> None:
    """Check that two runs ended with the same carry-on."""
    ours, theirs = saved_weights(actual), saved_weights(expected)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


def metrics_without_times(out: Path) -> list[dict[str, Any]]:
    """Return the metrics of a run, but for how long they took."""
    return [
        {key: value for key, value in line.items() if key not in TIMES}
        for line in read_metrics(out / "metrics.jsonl")
    ]


def without(report: TrainReport, *, out: str) -> TrainReport:
    """Return a report as of a run in another folder, without times."""
    return replace(
        report,
        out=out,
        carryon="",
        train_s=0.0,
        tokens_per_second=0.0,
        data_wait_ratio=0.0,
        evaluate_s=0.0,
        last_evaluate_s=0.0,
    )


def write_texts(path: Path) -> Path:
    """Write a corpus of 12 short texts with ids; none is marked as held out."""
    lines = [
        {
            "id": f"{path.stem}-{index}",
            "text": f"{index} is the thing " + "on an ice " * (index % 4),
        }
        for index in range(12)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@contextmanager
def without_plots() -> Iterator[None]:
    """Let runs draw no curves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "plot_curves", lambda metrics, path: False)
        yield


def begin_update(
    lineage: Path, data: Path, base: Path, settings: TrainSettings, *, dies_at: int = 0
) -> Any:  # noqa: ANN401
    """Start an update of a lineage in a child process; returns once it runs.

    With `dies_at` it ends as by kill -9 at the rename of a file or folder of this number: before
    an odd one and after an even one.
    """
    ours, theirs = processes().Pipe()
    process = processes().Process(
        target=_update_in_child, args=(lineage, data, base, settings, dies_at, theirs)
    )
    process.start()
    theirs.close()
    assert ours.recv() == "begun"
    return process


def begin(store: Path, out: Path, *, is_sweep: bool) -> Any:  # noqa: ANN401 -- a Process
    """Start the training in a child process; returns once it trains."""
    ours, theirs = processes().Pipe()
    process = processes().Process(target=_train_in_child, args=(store, out, is_sweep, theirs))
    process.start()
    theirs.close()
    assert ours.recv() == "begun"
    return process


def begin_tiny(store: Path, out: Path, samples_cache: Path, **changes: Any) -> Any:  # noqa: ANN401
    """Start `train_tiny` in a child process whose samples and key are kept in `samples_cache`."""
    process = processes().Process(
        target=_train_tiny_in_child, args=(store, out, samples_cache, changes)
    )
    process.start()
    return process


def _update_in_child(
    lineage: Path, data: Path, base: Path, settings: TrainSettings, dies_at: int, talk: Connection
) -> None:
    _be_quiet()
    if dies_at:
        _die_at_rename(dies_at)
    talk.send("begun")
    update(lineage=str(lineage), data=[str(data)], base=str(base), settings=settings)


def _train_in_child(store: Path, out: Path, is_sweep: bool, talk: Connection) -> None:
    _be_quiet()
    talk.send("begun")
    if is_sweep:
        sweep(store, out=out, settings=TINY, runs=RUNS)
    else:
        train_tiny(store, out, **KILLED)


def _train_tiny_in_child(
    store: Path, out: Path, samples_cache: Path, changes: dict[str, Any]
) -> None:
    _be_quiet()
    os.environ["CARRYON_CACHE"] = str(samples_cache)
    train_tiny(store, out, **changes)


def _die_at_rename(number: int) -> None:
    calls, real = count(1), Path.rename

    def rename(path: Path, target: Path) -> Path:
        is_last = next(calls) == number
        if is_last and number % 2:
            os._exit(9)
        renamed = real(path, target)
        if is_last:
            os._exit(9)
        return renamed

    Path.rename = rename  # type: ignore[method-assign, assignment]


def _be_quiet() -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- closed with the process
    torch.set_num_threads(1)
    finish.plot_curves = lambda metrics, path: False
    sweep_module.plot_runs = lambda metrics, path: False


def folder_bytes(root: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, but that of locks, by path."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
