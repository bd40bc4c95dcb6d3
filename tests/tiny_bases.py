"""Tiny random bases of many architectures, saved as transformers folders.

Every weight is random, norms too, so that a wrong norm, scale or cap cannot go unnoticed.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# "\u0120" is how byte-level tokenizers write a space.
MERGES = [
    ("t", "h"),
    ("th", "e"),
    ("\u0120", "the"),
    ("i", "n"),
    ("in", "g"),
    ("a", "n"),
    ("o", "n"),
]
VOCAB_SIZE = 272  # a few rows more than the tokenizer has tokens, as real bases have


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


def make_tiny_base(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Path:
    """Save a tiny random base with its tokenizer and chat template; return `folder`."""
    recipe = FAMILIES[family]
    special_ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        recipe.model_type, vocab_size=VOCAB_SIZE, **special_ids, **recipe.settings
    )
    model = AutoModelForCausalLM.from_config(config)
    randomize_(model, seed=seed)
    quiet = transformers.utils.logging
    had_bars = quiet.is_progress_bar_enabled()
    quiet.disable_progress_bar()
    model.to(dtype).save_pretrained(folder)
    if had_bars:
        quiet.enable_progress_bar()
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


def make_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with a few merges and a chat template."""
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [first + second for first, second in MERGES]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    assert len(vocabulary) <= VOCAB_SIZE
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def write_tiny_gguf(path: Path) -> Path:
    """Write a tiny random Llama (width 32, one block) as a GGUF file; return `path`."""
    import gguf

    tokenizer = make_tiny_tokenizer()
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in SPECIAL_TOKENS else 1 for piece in pieces])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (len(pieces), 32), "output_norm": (32,)}
    block = {"attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32)}
    block |= {"attn_output": (32, 32), "ffn_norm": (32,), "ffn_gate": (48, 32)}
    block |= {"ffn_up": (48, 32), "ffn_down": (32, 48)}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        weight = generator.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape)
        writer.add_tensor(f"{name}.weight", weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def randomize_(model: torch.nn.Module, *, seed: int) -> None:
    """Fill every parameter with random values: vectors around 1, matrices around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        spread, middle = (0.3, 0.0) if parameter.ndim > 1 else (0.2, 1.0)
        if name.endswith("bias"):
            middle = 0.0
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + middle)
