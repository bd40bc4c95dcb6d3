"""Tiny random bases of every tested architecture.

All weights are random, norms too, so a wrong norm, scale or cap changes the logits.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """How to build a tiny base of one architecture."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)


_PLAIN = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GEMMA = {**_PLAIN, "head_dim": 4, "sliding_window": 8, "num_hidden_layers": 3}

FAMILIES = {
    "llama": Family(model_type="llama", settings={**_PLAIN, "tie_word_embeddings": True}),
    "llama-untied": Family(model_type="llama", settings={**_PLAIN, "num_hidden_layers": 3}),
    "qwen2": Family(model_type="qwen2", settings=_PLAIN),
    "qwen3": Family(model_type="qwen3", settings={**_PLAIN, "head_dim": 8}),
    "gpt2": Family(
        model_type="gpt2",
        settings={"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    "gemma2": Family(model_type="gemma2", settings={**_GEMMA, "final_logit_softcapping": 2.0}),
    "gemma3": Family(model_type="gemma3_text", settings=_GEMMA),
    "mixtral": Family(model_type="mixtral", settings={**_PLAIN, "num_local_experts": 4}),
    "qwen3-moe": Family(
        model_type="qwen3_moe",
        settings={**_PLAIN, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
        | {"moe_intermediate_size": 8},
    ),
    # An untied head with bias.
    "phi": Family(model_type="phi", settings={**_PLAIN, "num_key_value_heads": 4}),
    # A layer norm without bias, and scaled logits.
    "cohere": Family(model_type="cohere", settings={**_PLAIN, "logit_scale": 0.25}),
    "granite": Family(model_type="granite", settings={**_PLAIN, "logits_scaling": 4.0}),
    # Positions counted from the attention mask, in a decoder inside the base model.
    "opt": Family(
        model_type="opt",
        settings={"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128},
    ),
}


def make_family_base(
    folder: Path,
    family: str,
    *,
    tokenizer: Tokenizer,
    vocab_size: int,
    special_ids: dict[str, int],
    dtype: torch.dtype,
    seed: int,
    **changes: Any,  # noqa: ANN401
) -> Path:
    """Save a tiny random base with `tokenizer`, `changes` made to its settings; return `folder`."""
    recipe = FAMILIES[family]
    settings = {"vocab_size": vocab_size, **special_ids, **recipe.settings, **changes}
    config = AutoConfig.for_model(recipe.model_type, **settings)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(config)
    randomize_(model, seed=seed)
    quiet: Any = transformers.utils.logging
    had_bars = quiet.is_progress_bar_enabled()
    quiet.disable_progress_bar()
    model.to(dtype).save_pretrained(folder)
    if had_bars:
        quiet.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomize_(model: nn.Module, *, seed: int) -> None:
    """Fill every parameter with random values: vectors around 1, matrices around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        spread, middle = (0.3, 0.0) if parameter.ndim > 1 else (0.2, 1.0)
        if name.endswith("bias"):
            middle = 0.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + middle)
