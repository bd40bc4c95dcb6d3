"""Tiny random bases of many architectures, saved as transformers folders.

Every weight is random, norms too, so that a wrong norm, scale or cap is noticed.
"""

from pathlib import Path

import numpy as np

from carryon.tools.bench.families import FAMILIES, randomize_
from carryon.tools.bench.tiny_base import (
    CHAT_TEMPLATE,
    MERGES,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    make_tiny_base,
    make_tiny_tokenizer,
)

__all__ = [
    "CHAT_TEMPLATE",
    "FAMILIES",
    "VOCAB_SIZE",
    "make_tiny_base",
    "make_tiny_tokenizer",
    "randomize_",
    "write_tiny_gguf",
]


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
