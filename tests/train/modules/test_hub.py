"""Sharing a carry-on through a hub: pushed and fetched over HTTP, by huggingface_hub itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelHubMixin
from support.tiny_carryons import make_tiny_carryon
from support.tiny_hub import run_tiny_hub

from carryon.cache.base.model import Base
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.modules.serialization import CARD, README, WEIGHTS, save_carryon

# huggingface_hub reads the address of the hub when it is imported: hence a process of its own.
PROGRAM = """
import sys, torch
from carryon.cache.errors import MissingError
from carryon.cache.settings import ForwardSettings
from carryon.train.inference.modeling import CarryOnForCausalLM

folder, base, out = sys.argv[1:]
forward = ForwardSettings(device="cpu", compute_dtype="float32")
CarryOnForCausalLM.from_pretrained(folder, forward=forward).push_to_hub("anna/tiny-carry-on")

model = CarryOnForCausalLM.from_pretrained("anna/tiny-carry-on", base=base, forward=forward)
tokens = torch.tensor([[5, 6, 7]])
torch.save(model(tokens).logits, out)
model.add_carryon("again", "anna/tiny-carry-on@main")
assert torch.equal(model(tokens, carryons=["again"]).logits, model(tokens).logits)
try:
    model.add_carryon("none", "anna/none")
except MissingError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_carryon_pushed_to_a_hub_comes_back_by_its_id(
    tiny_base: Base, tiny_base_folder: Path, tmp_path: Path
) -> None:
    carryon, card = make_tiny_carryon(tiny_base)
    save_carryon(tmp_path / "carryon", carryon, card, dtype=torch.bfloat16)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "carryon"), str(tiny_base_folder)]

    with run_tiny_hub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_x"}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        command.append(str(tmp_path / "logits.pt"))
        done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    model = CarryOnForCausalLM.from_pretrained(tmp_path / "carryon", base=tiny_base)
    expected = model(torch.tensor([[5, 6, 7]])).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    assert "anna/none: expected the folder of a carry-on, or its id on a hub" in done.stdout
    files = hub.repositories["anna/tiny-carry-on"]
    assert files.keys() == {CARD, WEIGHTS, README, "config.json"}
    for name in (CARD, README):
        assert str(tiny_base_folder.parent).encode() not in files[name], name
    assert json.loads(files[CARD])["base"]["id"] == tiny_base_folder.name


def test_the_mixin_is_that_of_huggingface_hub() -> None:
    assert issubclass(CarryOnForCausalLM, ModelHubMixin)
    assert CarryOnForCausalLM.save_pretrained is ModelHubMixin.save_pretrained
