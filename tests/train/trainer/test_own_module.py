"""Your own module and your own callbacks in a training run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_runs import TINY, Killed, kill_at, saved_weights, train_tiny, without_plots
from support.tiny_train_stores import make_tiny_store
from torch import Tensor, nn

from carryon.cache.errors import InputError
from carryon.train import train
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.packed_attention import Packing
from carryon.train.modules.serialization import read_card
from carryon.train.trainer.metrics import read_metrics


class Linear(nn.Module):
    """A linear correction of `final` from one tap: nothing but the two methods."""

    def __init__(self, tap: str = "final", *, width: int = 16) -> None:
        super().__init__()
        self.tap = tap
        self.map = nn.Linear(width, width)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def correct_packed(
        self, states: Mapping[str, Tensor], packing: Packing, positions: Tensor
    ) -> Tensor:
        if self.training:
            self.calls += 1000
        delta: Tensor = self.map(states[self.tap][positions].float())
        return delta

    def customize(
        self, states: Mapping[str, Tensor], positions: Tensor, delta: Tensor, *, alpha: float
    ) -> Tensor:
        return states["final"][positions].float() + alpha * delta.float()


@pytest.fixture(autouse=True)
def no_plots() -> Any:  # noqa: ANN401
    with without_plots():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("own") / "store", taps=("final", "layer.1"))


def test_a_module_is_trained_in_place_and_its_weights_come_back(
    store: Path, tmp_path: Path
) -> None:
    module = Linear("layer.1")

    report = train_tiny(store, tmp_path / "run", module=module, taps=["layer.1"])

    assert report.carryon_nll < report.base_nll
    assert report.num_parameters == 16 * 16 + 16
    assert read_card(report.carryon).settings["kind"] == "custom"
    other = Linear("layer.1")
    other.load_state_dict(load_file(Path(report.carryon) / "carryon.safetensors"))
    assert torch.equal(other.map.weight, module.map.weight)
    assert other.calls == module.calls == report.num_steps * 1000
    finished = Linear("layer.1")
    assert train_tiny(store, tmp_path / "run", module=finished, taps=["layer.1"]) == report
    assert torch.equal(finished.map.weight, module.map.weight)


def test_a_killed_run_of_a_module_resumes_to_the_same_bits(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_tiny(store, tmp_path / "whole", module=Linear())
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            train_tiny(store, tmp_path / "run", module=Linear())

    train_tiny(store, tmp_path / "run", module=Linear())

    for name, weight in saved_weights(tmp_path / "run").items():
        assert torch.equal(weight, saved_weights(tmp_path / "whole")[name]), name


def test_a_run_of_another_module_is_refused(store: Path, tmp_path: Path) -> None:
    train_tiny(store, tmp_path / "run", module=Linear())

    with pytest.raises(InputError, match="module is 'Linear of 272 trained values' there and None"):
        train_tiny(store, tmp_path / "run", kind="custom")


def test_a_module_with_settings_of_a_kind_is_saved_as_that_kind(
    store: Path, tmp_path: Path
) -> None:
    report = train_tiny(store, tmp_path / "kind")
    module = build_bottleneck(TINY.carryon, base_width=16, seed=0)

    train_tiny(store, tmp_path / "module", module=module, width=64)

    assert read_card(tmp_path / "module/carryon").settings == read_card(report.carryon).settings
    for name, weight in saved_weights(tmp_path / "module").items():
        assert torch.equal(weight, saved_weights(tmp_path / "kind")[name]), name


def test_a_module_without_the_methods_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got Linear without correct_packed"):
        train_tiny(store, tmp_path / "run", module=nn.Linear(2, 2))

    assert not (tmp_path / "run").exists()


def test_callbacks_get_every_line_of_the_metrics(store: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = []

    train_tiny(store, tmp_path / "run", callbacks=[lines.append, dict.clear])

    assert lines == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum("held_out_nll" in line for line in lines) == 3


class Stop(Exception):
    """An exception of a callback."""


@pytest.mark.parametrize("key", ["loss", "held_out_nll"])
def test_an_exception_of_a_callback_stops_with_a_checkpoint(
    store: Path, tmp_path: Path, key: str
) -> None:
    seen: list[int] = []

    def stop(line: dict[str, Any]) -> None:
        seen.append(line["step"])
        if key in line and line["step"] > 3:
            raise Stop

    with pytest.raises(Stop):
        train_tiny(store, tmp_path / "run", callbacks=[stop])
    stopped_at = seen[-1]
    assert 3 < stopped_at < 12
    assert (tmp_path / "run/checkpoints" / f"step-{stopped_at:08d}").is_dir()
    report = train_tiny(store, tmp_path / "run")

    assert report == train_tiny(store, tmp_path / "run")
    expected = train_tiny(store, tmp_path / "whole")
    assert report.carryon_nll == expected.carryon_nll


def test_an_exception_at_the_end_leaves_a_finished_run(store: Path, tmp_path: Path) -> None:
    def stop(line: dict[str, Any]) -> None:
        if (tmp_path / "run" / "checkpoints" / "step-00000012").exists():
            raise Stop

    with pytest.raises(Stop):
        train(store, out=tmp_path / "run", settings=TINY, callbacks=[stop])

    assert (tmp_path / "run" / "result.json").exists()
