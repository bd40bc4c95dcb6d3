"""A tiny random base with its tokenizer, made in a moment: a real one in all but size."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from carryon.tools.bench.families import make_family_base

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
    make: Any = PreTrainedTokenizerFast
    tokenizer_of_base: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer_of_base
