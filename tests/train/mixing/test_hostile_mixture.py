"""A carry-on with a gate from anyone: whole, or refused in one line before memory is taken."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_carryons import resign
from torch import Tensor

from carryon.cache.errors import CarryOnError, InputError
from carryon.train.config import CarryOnSettings
from carryon.train.mixing.gate import Gate
from carryon.train.mixing.mixture import load_mixture
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.card import CarryOnCard
from carryon.train.modules.card_checks import SOURCE_FACTS
from carryon.train.modules.card_file import GATE, MAX_GATE_BYTES, WEIGHTS
from carryon.train.modules.serialization import load_carryon, read_card, read_weights, save_carryon
from carryon.train.verify import verify_folder

SETTINGS = CarryOnSettings(width=8, blocks=1, heads=2, intermediate_size=8)
SOURCE = {name: f"of {name}" for name in SOURCE_FACTS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A mixture as it is saved."""
    card = CarryOnCard(
        settings=SETTINGS.to_dict(),
        base_width=16,
        base={"id": "org/tiny", "weights_sha256": "ab" * 32},
        store_fingerprint="cd" * 32,
        split={"held_out_ratio": 0.05, "seed": 0},
        alpha=1.0,
        figures={},
        versions={},
        mixture={"by": "probability", "sources": [SOURCE]},
    )
    shares = torch.tensor([0.5, 0.5])
    gate = Gate(anchor_width=16, source_widths=(), num_sources=1, shares=shares, seed=0)
    carryon = build_bottleneck(SETTINGS, base_width=16, seed=0)
    save_carryon(tmp_path / "mixed", carryon, card, dtype=torch.float32, gate=gate)
    return tmp_path / "mixed"


def assert_refused(folder: Path) -> str:
    """Return the line with which a mixture is refused, by whoever loads it or looks at it."""
    with pytest.raises(CarryOnError) as caught:
        load_mixture(folder)
    for read in (load_carryon, read_card):
        with pytest.raises(CarryOnError):
            read(folder)
    assert not verify_folder(folder).is_sound
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


def test_a_whole_mixture_is_loaded_whatever_the_default_device(folder: Path) -> None:
    with torch.device("meta"):
        mixed, _ = load_mixture(folder)
    assert {weight.device.type for weight in mixed.state_dict().values()} == {"cpu"}
    assert verify_folder(folder).is_sound


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda gate: gate | {"out.bias": torch.tensor([0.0, float("nan")])}, "expected finite"),
        (lambda gate: gate | {"out.bias": torch.zeros(3)}, r"out.bias: expected \(2,\), got"),
        (lambda gate: gate | {"more": torch.zeros(3)}, "more: expected nothing"),
        (lambda gate: {}, "expected .* got nothing"),
        (lambda gate: {n: w.to(torch.int64) for n, w in gate.items()}, "floating point"),
    ],
)
def test_a_gate_of_other_weights_is_refused(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], text: str
) -> None:
    save_file(change(load_file(folder / GATE)), folder / GATE)
    resign(folder)
    with pytest.raises(InputError, match=text):
        load_mixture(folder)
    assert_refused(folder)


def test_a_gate_that_is_larger_than_any_is_not_read(folder: Path) -> None:
    size = 1 << 40  # of zeros, which take no room on the disk
    tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"out.bias": tensor}).encode()
    (folder / GATE).write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(folder / GATE, 8 + len(header) + size)
    assert f"expected at most {MAX_GATE_BYTES:,} bytes" in assert_refused(folder)


def test_a_mixture_without_its_gate_is_refused(folder: Path) -> None:
    (folder / GATE).unlink()
    assert GATE in assert_refused(folder)


def test_a_gate_that_no_card_tells_of_is_not_left_out(folder: Path) -> None:
    resign(folder, mixture=None)
    for read in (load_carryon, read_card, read_weights):
        with pytest.raises(InputError, match="gate.safetensors: expected a card that names"):
            read(folder)
    assert not verify_folder(folder).is_sound


@pytest.mark.parametrize(
    "mixture",
    [
        {"by": "probability", "sources": []},
        {"by": "probability", "sources": [SOURCE] * 65},
        {"by": "probability", "sources": [SOURCE | {"name": "x\ny"}]},
        {"by": "probability", "sources": [SOURCE | {"more": "x"}]},
        {"by": "state", "sources": [SOURCE]},
        {"sources": [SOURCE]},
        {"by": "probability", "sources": 5},
        {"by": "probability", "sources": [5]},
        {"by": "probability", "sources": [SOURCE] * 2},
    ],
    ids=range(9),
)
def test_wrong_sources_in_a_card_are_refused(folder: Path, mixture: dict[str, Any]) -> None:
    resign(folder, mixture=mixture)
    assert_refused(folder)


def test_other_weights_beside_the_gate_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / GATE).read_bytes())
    assert_refused(folder)
