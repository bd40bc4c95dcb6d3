"""The registry of kinds: one's own kind is trained, saved and loaded; mistakes are named."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from support.tiny_runs import train_tiny
from support.tiny_train_stores import make_tiny_store
from torch import Tensor, nn

from carryon.cache.errors import InputError
from carryon.train.config import CarryOnSettings
from carryon.train.inference.evaluate import evaluate
from carryon.train.kinds import KINDS, Kind, get_kind, register_kind
from carryon.train.modules.carryon import as_carryon, customized_states, make_carryon
from carryon.train.modules.packed_attention import Packing
from carryon.train.modules.serialization import load_carryon
from carryon.train.modules.taps import stream_taps


class Linear(nn.Module):
    """A linear correction: nothing but the two methods that the trainer calls."""

    def __init__(self, settings: CarryOnSettings, base_width: int) -> None:
        super().__init__()
        self.map = nn.Linear(base_width, base_width)
        nn.init.zeros_(self.map.weight)

    def correct_packed(
        self, states: Mapping[str, Tensor], packing: Packing, positions_M: Tensor
    ) -> Tensor:
        out: Tensor = self.map(states["final"][positions_M].float())
        return out

    def customize(
        self, states: Mapping[str, Tensor], positions_M: Tensor, delta_MD: Tensor, *, alpha: float
    ) -> Tensor:
        return customized_states(states["final"][positions_M], delta_MD, alpha=alpha)


class Mixed(Linear):
    """Mixes the states by a fixed matrix, which is drawn from a seed and not saved."""

    def __init__(self, settings: CarryOnSettings, base_width: int) -> None:
        super().__init__(settings, base_width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            drawn = nn.Linear(base_width, base_width).weight.detach()
        self.mix = drawn / drawn.norm()


@pytest.fixture
def linear() -> Iterator[None]:
    """A kind of one's own."""
    register_kind("linear", Kind(build=Linear))
    yield
    del KINDS["linear"]


@pytest.mark.usefixtures("linear")
def test_a_registered_kind_is_trained_saved_loaded_and_evaluated(tmp_path: Path) -> None:
    store, out = make_tiny_store(tmp_path / "store"), tmp_path / "run"
    report = train_tiny(store, out, kind="linear")
    assert report.carryon_nll < report.base_nll
    module, card = load_carryon(out / "carryon")
    assert isinstance(module, Linear)
    assert card.settings["kind"] == "linear"
    again = evaluate(store=str(store), carryon=str(out / "carryon"), device="cpu")
    assert again.carryon_nll == pytest.approx(report.carryon_nll, abs=1e-2)


def test_what_a_kind_computes_from_what_it_draws_is_the_same_when_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(KINDS, "mixed", Kind(build=Mixed))
    store, out = make_tiny_store(tmp_path / "store"), tmp_path / "run"
    train_tiny(store, out, kind="mixed")
    loaded, card = load_carryon(out / "carryon")
    built = Mixed(loaded.settings, card.base_width)
    assert torch.equal(loaded.mix, built.mix)  # type: ignore[arg-type]


@pytest.mark.usefixtures("linear")
@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "muon"},
        {"weights_dtype": "bfloat16", "head_dtype": "bfloat16"},
        {"weights_dtype": "bfloat16", "head_dtype": "float32"},
    ],
)
def test_a_registered_kind_trains_with_every_optimizer(
    tmp_path: Path, change: dict[str, str]
) -> None:
    report = train_tiny(
        make_tiny_store(tmp_path / "store"), tmp_path / "run", kind="linear", **change
    )
    assert report.carryon_nll < report.base_nll


@pytest.mark.usefixtures("linear")
def test_recompute_is_refused_for_a_module_without_blocks(tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store")
    with pytest.raises(InputError, match="recompute: expected blocks of transformers in Linear"):
        train_tiny(store, tmp_path / "run", kind="linear", recompute=True)


@pytest.mark.usefixtures("linear")
def test_a_name_is_registered_once() -> None:
    with pytest.raises(InputError, match="register_kind: expected a new name, got linear"):
        register_kind("linear", Kind(build=Linear))


def test_an_unknown_kind_is_refused_with_the_near_one() -> None:
    with pytest.raises(InputError, match="got botleneck: did you mean bottleneck"):
        CarryOnSettings(kind="botleneck")
    with pytest.raises(InputError, match="got linear: register_kind adds a kind of your own"):
        get_kind("linear")


def test_a_module_without_both_methods_is_refused() -> None:
    with pytest.raises(InputError, match="got Linear without correct_packed"):
        as_carryon(nn.Linear(2, 2), CarryOnSettings())
    with pytest.raises(InputError, match=r"expected its module in train\(module=...\)"):
        make_carryon(CarryOnSettings(kind="custom"), base_width=4, blocks=lambda: None)  # type: ignore[arg-type, return-value]


def test_a_kind_that_corrects_final_reads_it_too() -> None:
    assert stream_taps(CarryOnSettings(taps=["layer.1"])) == ["final", "layer.1"]
    assert stream_taps(CarryOnSettings(kind="top", taps=["layer.1"])) == ["layer.1"]
