"""The composed model on a fake GPU: prompts, and steps with its cache."""

from pathlib import Path

import pytest
import torch
from support.fake_gpu import CUDA, FakeGpu, move_base, on_fake_gpu
from support.tiny_carryons import make_tiny_carryon
from transformers import DynamicCache

from carryon.cache.base.model import load_base
from carryon.cache.settings import ForwardSettings
from carryon.train.inference.correction import carryon_layers
from carryon.train.inference.modeling import CarryOnForCausalLM

FORWARD = ForwardSettings(device="cpu", compute_dtype="bfloat16")


def _model(gpu: FakeGpu, folder: Path) -> CarryOnForCausalLM:
    base = load_base(str(folder), forward=FORWARD)
    carryon, card = make_tiny_carryon(base, taps=["layer.1", "final"])
    other, other_card = make_tiny_carryon(base, taps=["layer.1", "final"], seed=6)
    with gpu.setup():
        model = CarryOnForCausalLM(move_base(base), carryon, card)
    model.carryons.put("other", other.state_dict(), other_card)
    return model


@pytest.mark.parametrize("alpha", [None, [0.5, 1.0]], ids=["one alpha", "an alpha each"])
@pytest.mark.parametrize("names", [None, ["default", "other"]], ids=["one", "one each"])
@on_fake_gpu
def test_a_step_of_decoding(
    gpu: FakeGpu, tiny_base_folder: Path, names: list[str] | None, alpha: list[float] | None
) -> None:
    model = _model(gpu, tiny_base_folder)
    cache = DynamicCache()
    with gpu.setup():  # weights of the carry-ons; the prompt is read once
        prompt = torch.ones(2, 5, dtype=torch.int64, device=CUDA)
        how = {"past_key_values": cache, "carryons": names, "alpha": alpha}
        with torch.inference_mode():
            model(prompt, **how)

    for _ in range(2):
        with torch.inference_mode():
            output = model(prompt[:, :1], **how)

    assert output.logits.device == CUDA
    assert output.logits.shape[:2] == (2, 1)
    [first, *_] = carryon_layers(cache)
    assert first.get_seq_length() == cache.get_seq_length() == 7
    assert gpu.waits == []
