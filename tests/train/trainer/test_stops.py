"""A run stopped by Ctrl-C after any step has the metrics and the bits of one never stopped."""

import signal
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import assert_same_bits, metrics_without_times, train_tiny, without_plots
from support.tiny_train_stores import make_tiny_store

from carryon.train.trainer import run as run_module
from carryon.train.trainer.step import take_step

OPTIONS: dict[str, Any] = {"evaluate_every": 3, "checkpoint_every": 4, "log_every": 4}


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Press Ctrl-C during a step of the next training."""
    calls = iter(range(1000))

    def stopped_step(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if next(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return take_step(*args, **kwargs)

    monkeypatch.setattr(run_module, "take_step", stopped_step)


@pytest.mark.parametrize("finish_with", ["last", "best"])
def test_ctrl_c_after_any_step_changes_neither_metrics_nor_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finish_with: str
) -> None:
    store = make_tiny_store(tmp_path / "store")
    options = OPTIONS | {"finish_with": finish_with}
    with without_plots():
        whole = tmp_path / "whole"
        num_steps = train_tiny(store, whole, **options).num_steps
        for step in range(num_steps):
            out = tmp_path / str(step)
            with monkeypatch.context() as patch:
                stop_at(patch, step)
                with pytest.raises(KeyboardInterrupt):
                    train_tiny(store, out, **options)
            train_tiny(store, out, **options)
            assert_same_bits(out, whole)
            assert metrics_without_times(out) == metrics_without_times(whole), step
