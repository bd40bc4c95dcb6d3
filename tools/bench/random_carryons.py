"""Carry-ons with random weights, and prompts, to measure customized models without training."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base
from carryon.tools.bench.corpora import PYTHON, write_named_corpus
from carryon.train.config import CarryOnSettings
from carryon.train.modules.bottleneck import Bottleneck, build_bottleneck
from carryon.train.modules.card import CarryOnCard
from carryon.train.modules.carryon import num_parameters

BYTES_PER_WEIGHT = 2
"""Carry-ons are saved in bfloat16."""
MAX_BYTES = 1_100_000
"""Default size of a carry-on; its width follows from it and the base's."""
_RATIO = 0.3  # norm of a correction relative to the state, about that of a trained carry-on


def make_carryons(
    base: Base, num: int, *, max_bytes: int, tokens: Tensor
) -> list[tuple[Bottleneck, CarryOnCard]]:
    """Return different random carry-ons of one shape; equal arguments give equal ones.

    Args:
        base: base of the carry-ons.
        num: number of carry-ons.
        max_bytes: size of each, at most.
        tokens: [B, T] of some text, on which the corrections are scaled.
    """
    settings = pick_shape(base.identity.width, max_bytes=max_bytes)
    # A copy: tensors made in inference mode cannot be differentiated.
    final = capture(base, ["final"], tokens)["final"].float().cpu().clone()
    made = []
    for seed in range(num):
        carryon = build_bottleneck(settings, base_width=base.identity.width, seed=seed).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in carryon.named_parameters():
                if not weight.any():  # an untrained carry-on changes nothing
                    spread = 0.02 if name.endswith("bias") else weight.shape[-1] ** -0.5
                    weight.normal_(std=spread, generator=generator)
            delta = carryon({"final": final})
            carryon.up.weight.mul_(_RATIO * final.norm() / delta.norm())
        made.append((carryon, empty_card(settings, base.identity.to_dict())))
    return made


def pick_shape(base_width: int, *, max_bytes: int) -> CarryOnSettings:
    """Return the widest shape with the default proportions that fits `max_bytes`."""
    default = CarryOnSettings()
    step = 2 * default.heads  # the width is a multiple of heads and rotary pairs
    best = dataclasses.replace(default, width=step, intermediate_size=step)
    for width in range(2 * step, 8192, step):
        intermediate_size = max(1, width * default.intermediate_size // default.width)
        settings = dataclasses.replace(default, width=width, intermediate_size=intermediate_size)
        with torch.device("meta"):
            num_bytes = (
                num_parameters(Bottleneck(settings, base_width=base_width)) * BYTES_PER_WEIGHT
            )
        if num_bytes > max_bytes:
            break
        best = settings
    return best


def make_prompts(base: Base, work: Path, *, num: int, num_tokens: int) -> Tensor:
    """Return prompts of equal length from Python's standard library, [num, num_tokens] int64."""
    path = work / "prompts.jsonl"
    write_named_corpus(PYTHON, path, num_tokens=4 * num * num_tokens)
    lines = path.read_text(encoding="utf-8").splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines)
    ids = base.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    needed = num * num_tokens
    ids = (ids * -(-needed // len(ids)))[:needed]
    return torch.tensor(ids, dtype=torch.int64).reshape(num, num_tokens)


def empty_card(settings: CarryOnSettings, identity: dict[str, Any]) -> CarryOnCard:
    """Return the card of a carry-on without a run, for the base of an identity."""
    return CarryOnCard(
        settings=settings.to_dict(),
        base_width=identity["width"],
        base=identity,
        store_fingerprint="0" * 64,
        split={},
        alpha=1.0,
        figures={},
        versions={},
    )
