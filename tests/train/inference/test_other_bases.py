"""Carry-ons on bases that are spread over devices or quantized."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_bases import VOCAB_SIZE, make_tiny_base
from support.tiny_carryons import make_tiny_carryon

from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import InputError, SettingMismatchError
from carryon.cache.settings import ForwardSettings
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.merge import load_for_base
from carryon.train.inference.mixing.source_base import place_sources
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.inference.scoring.arms import Arm
from carryon.train.inference.scoring.models import Models
from carryon.train.modules.card_checks import check_values
from carryon.train.modules.serialization import save_carryon

TAPS = ("final", "layer.1", "layer.0")
PLAIN = ForwardSettings(device="cpu", compute_dtype="float32")


@pytest.fixture
def spread_base(tiny_base: Base, tmp_path: Path) -> Base:
    """The tiny base with one block, the norm and nothing else on disk."""
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "disk"}
    places |= {"model.layers.1": "cpu", "model.norm": "disk", "lm_head": "cpu"}
    (tmp_path / "map.json").write_text(json.dumps(places))
    forward = ForwardSettings(device_map=str(tmp_path / "map.json"), compute_dtype="float32")
    return load_base(tiny_base.source, forward=forward)


def test_a_carryon_on_a_spread_base_answers_as_on_a_whole_one(
    tiny_base: Base, spread_base: Base
) -> None:
    carryon, card = make_tiny_carryon(tiny_base, taps=TAPS)
    plain, spread = (CarryOnForCausalLM(base, carryon, card) for base in (tiny_base, spread_base))
    tokens = torch.randint(3, VOCAB_SIZE, (2, 9), generator=torch.Generator().manual_seed(5))
    assert torch.equal(plain(tokens).logits, spread(tokens).logits)
    assert spread.device == torch.device("cpu")
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}
    assert torch.equal(plain.generate(tokens, **settings), spread.generate(tokens, **settings))
    prompts = ["an ice end", "the thing"]
    assert plain.answer(prompts, max_new_tokens=5) == spread.answer(prompts, max_new_tokens=5)


def test_what_changes_blocks_and_mixtures_need_a_base_in_one_place(
    spread_base: Base, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="native and top: expected a base on one device"):
        load_for_base(tmp_path, spread_base)
    with pytest.raises(InputError, match=r"mix: .* Fix: leave out --device-map"):
        place_sources([], [], [], anchor=spread_base, forward=PLAIN, where="carryon")


def test_a_carryon_names_the_quantization_that_it_needs(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    folder = make_tiny_base(tmp_path / "base")
    dense = load_base(str(folder), forward=PLAIN)
    own = load_base(str(folder), forward=replace(PLAIN, quantize="int8"))
    carryon, card = make_tiny_carryon(own)
    check_values(card.to_dict())
    save_carryon(tmp_path / "carryon", carryon, card, dtype=torch.float32)
    with pytest.raises(SettingMismatchError, match=r"\(int8\), got none.*--quantize int8"):
        CarryOnForCausalLM.from_pretrained(tmp_path / "carryon", base=dense)
    with pytest.raises(SettingMismatchError, match=r"\(int8\), got none.*--quantize int8"):
        CarryOnForCausalLM.from_pretrained(tmp_path / "carryon", base=folder, forward=PLAIN)
    found = CarryOnForCausalLM.from_pretrained(tmp_path / "carryon", forward=PLAIN)
    assert found.identity.quantization == "int8"
    expected = CarryOnForCausalLM(own, carryon, card).answer("an ice", max_new_tokens=5)
    assert found.answer("an ice", max_new_tokens=5) == expected
    other, dense_card = make_tiny_carryon(dense)
    with pytest.raises(SettingMismatchError, match=r"\(none\), got int8.*leave out --quantize"):
        CarryOnForCausalLM(own, other, dense_card)


def test_a_lora_is_merged_into_a_dense_base_alone(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("peft")
    folder = make_tiny_base(tmp_path / "base")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"")
    models = Models(
        base=str(folder),
        carryon=None,
        forward=replace(PLAIN, quantize="int8"),
        settings=GenerateSettings(),
        engine="transformers",
        batch_rows=1,
    )
    arm = Arm(name="lora", model="lora", place=str(tmp_path / "lora"))
    with pytest.raises(InputError, match=r"expected a dense base.*\(int8\)"):
        models.open(arm)
