"""A mixture that is trained on tiny bases, and its model with and without a cache."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from carryon.cache.settings import ForwardSettings
from carryon.train.inference.mixing.modeling import MixedForCausalLM
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.trainer import finish
from carryon.train.trainer.trainer import train
from support.mixed_stores import make_anchor, make_source
from support.tiny_runs import TINY

FORWARD = ForwardSettings(device="cpu", compute_dtype="float32")
NAMES = ("good", "random")


def make_mixtures(folder: Path) -> Path:
    """Train a carry-on with a gate, and a gate alone, over two sources; return the folder."""
    anchor = make_anchor(folder)
    make_source(folder, anchor, name="good", steps=60)
    make_source(folder, anchor, name="random", kind="metaspace", vocab_size=360, seed=5)
    paths: list[Any] = [str(folder / name) for name in NAMES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "plot_curves", lambda metrics, path: False)
        for kind in ("bottleneck", "none"):
            train(anchor, out=folder / kind, settings=TINY, mix=paths, kind=kind, epochs=3)
    return folder


def load(folder: Path, kind: str = "bottleneck", **changes: Any) -> MixedForCausalLM:  # noqa: ANN401
    """Return the model of a mixture."""
    model = CarryOnForCausalLM.from_pretrained(
        folder / kind / "carryon", **{"forward": FORWARD, **changes}
    )
    assert isinstance(model, MixedForCausalLM)
    return model


def generate(model: Any, texts: list[str], *, use_cache: bool = True, **settings: Any) -> Tensor:  # noqa: ANN401
    """Return new tokens of texts, padded on the left, [B, T]."""
    tokenizer = model.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    given: dict[str, Any] = {"max_new_tokens": 14, "do_sample": False, **settings}
    with torch.no_grad():
        out: Tensor = model.generate(
            batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=use_cache,
            pad_token_id=tokenizer.pad_token_id,
            **given,
        )
    return out[:, batch.input_ids.shape[1] :]
