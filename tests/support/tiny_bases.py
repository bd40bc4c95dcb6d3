"""Tiny random bases of many architectures, saved as transformers folders.

Every weight is random, norms too, so that a wrong norm, scale or cap is noticed.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from carryon.tools.bench.families import FAMILIES, make_family_base, randomize_

__all__ = ["FAMILIES", "make_tiny_base", "make_tiny_tokenizer", "randomize_", "write_tiny_gguf"]

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


def make_tiny_base(
    folder: Path,
    family: str = "llama",
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    context: int = 128,
    **changes: Any,  # noqa: ANN401
) -> Path:
    """Save a tiny random base with its tokenizer and chat template; return `folder`.

    Args:
        folder: where it is saved.
        family: architecture, a key of FAMILIES.
        dtype: of the weights.
        seed: of the weights.
        context: tokens that the tokenizer allows.
        changes: made to the settings of the architecture.
    """
    return make_family_base(
        folder,
        family,
        tokenizer=make_tiny_tokenizer(context),
        vocab_size=VOCAB_SIZE,
        special_ids={"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        dtype=dtype,
        seed=seed,
        **changes,
    )


def make_tiny_tokenizer(context: int = 128) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with a few merges and a chat template."""
    segments = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    segments += [first + second for first, second in MERGES]
    vocabulary = {segment: index for index, segment in enumerate(segments)}
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
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def write_tiny_gguf(path: Path) -> Path:
    """Write a tiny random Llama (width 32, one block) as a GGUF file; return `path`."""
    import gguf

    tokenizer = make_tiny_tokenizer()
    segments = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(segments))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(segments)
    writer.add_token_types([3 if segment in SPECIAL_TOKENS else 1 for segment in segments])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (len(segments), 32), "output_norm": (32,)}
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
