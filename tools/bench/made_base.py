"""Bases without weights worth loading: one that costs nothing, and random ones of real shapes.

The first hands out states that are in memory already, so that an extraction with it measures all
but the forward passes. The others are made on their device in seconds, without files or network.
Letters: B rows of a batch, T positions, D width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from carryon.cache.base.architecture import Architecture, get_architecture
from carryon.cache.base.identity import BaseIdentity
from carryon.cache.base.model import Base
from carryon.tools.bench.tiny_base import make_tiny_tokenizer

_VOCABULARY = 32_000
_LAYERS = {1024: 24, 2048: 16, 4096: 32}
"""Blocks by width, as bases of 0.4B, 1B and 7B parameters have them; others: 2."""


class _Costless(nn.Module):
    """A decoder whose states are a part of those given, another one for each batch."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.norm = nn.Identity()
        self._states, self._calls = states, 0

    def forward(self, input_ids: Tensor, **_: object) -> Tensor:
        """Return states [B, T, D], a view."""
        count = input_ids.numel()
        self._calls += 1
        first = self._calls * 7919 % max(1, len(self._states) - count)
        part = self._states[first : first + count]
        final: Tensor = self.norm(part.reshape(*input_ids.shape, part.shape[-1]))
        return final


def costless_base(states: Tensor) -> Base:
    """Return a base with the tap `final` alone, whose states [N, D] are given.

    Args:
        states: at least as many as the largest batch has tokens, pads included.
    """
    decoder, width = _Costless(states), int(states.shape[1])
    untyped: Any = None
    return Base(
        source="costless",
        model=untyped,
        tokenizer=untyped,
        identity=_identity("costless", layers=1, width=width, vocabulary=1),
        architecture=Architecture(
            decoder=decoder,
            blocks=nn.ModuleList([nn.Identity()]),
            norm=decoder.norm,
            head=nn.Linear(1, 1),
            logit_scale=1.0,
            softcap=None,
        ),
        device=states.device,
        compute_dtype=states.dtype,
        checkpoint_dtype=states.dtype,
        attention="none",
    )


def random_base(width: int, *, device: torch.device, context: int) -> Base:
    """Return a Llama with random weights in bfloat16, with blocks as a real base of its width has.

    Args:
        width: D, a multiple of 64.
        device: where it is made.
        context: tokens that it reads at most.
    """
    head_width = 128 if width >= 2048 else min(64, width // 4)
    heads = width // head_width
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=(width * 11 // 4 + 255) // 256 * 256,
        num_hidden_layers=_LAYERS.get(width, 2),
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )
    auto: Any = AutoModelForCausalLM
    with device:
        model = auto.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.requires_grad_(False)
    name = f"random-{width}"
    layers = config.num_hidden_layers
    return Base(
        source=name,
        model=model,
        tokenizer=make_tiny_tokenizer(context),
        identity=_identity(name, layers=layers, width=width, vocabulary=_VOCABULARY),
        architecture=get_architecture(model),
        device=device,
        compute_dtype=torch.bfloat16,
        checkpoint_dtype=torch.bfloat16,
        attention="sdpa",
    )


def _identity(name: str, *, layers: int, width: int, vocabulary: int) -> BaseIdentity:
    none = "0" * 64
    return BaseIdentity(
        id=name,
        revision=None,
        architecture="LlamaForCausalLM",
        num_layers=layers,
        width=width,
        vocab_size=vocabulary,
        context_tokens=1 << 20,
        config_sha256=none,
        weights_sha256=none,
        tokenizer_sha256=none,
        chat_template_sha256=None,
    )
