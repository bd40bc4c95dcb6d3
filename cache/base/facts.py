"""What is known of a base without its weights: tokenizer, sizes and end tokens.

Reading a corpus needs no more, so wrong data are refused before a large base is loaded.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from carryon.cache.base.loading import read_config, read_generation_config, read_tokenizer, say_slow
from carryon.cache.base.source.location import BaseSource, locate_base
from carryon.cache.base.source.own_code import digest_code
from carryon.cache.errors import InputError

if TYPE_CHECKING:
    from carryon.cache.base.model import Base

NO_CONTEXT_LIMIT = 1 << 30
"""`context_tokens` of a base whose config names no limit."""
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFacts:
    """Tokenizer and sizes of a base. A size is None where the config does not name it."""

    tokenizer: Tokenizer
    context_tokens: int
    """Context length; `NO_CONTEXT_LIMIT` for a base whose config names none."""
    end_tokens: tuple[int, ...]
    """Token ids that end generation: of the generation config and the tokenizer."""
    vocab_size: int | None
    """Rows of the embedding: token ids are below it. Tokenizers may be longer."""
    num_layers: int | None
    """Number of blocks."""
    width: int | None
    """Width of the hidden states."""


def read_facts(source: str, *, like: str | None = None, trusts_code: bool = False) -> BaseFacts:
    """Return the facts of a base that is not loaded.

    Args:
        source: hub id, folder or .gguf file.
        like: digest of a recorded tokenizer, as of `read_tokenizer`.
        trusts_code: whether Python code that comes with it may run.

    Raises:
        MissingError: there is no such base.
        InputError: its tokenizer or config cannot be read.
        MissingExtraError: a .gguf file without the package gguf.
    """
    place: BaseSource = locate_base(source, trusts_code=trusts_code)
    if trusts_code:
        digest_code(place)  # refuses what cannot be recorded, before it runs
    say_slow(source, gguf_file=place.gguf_file)
    tokenizer = read_tokenizer(place, like=like)
    whole = read_config(place)
    config = whole.get_text_config()
    return BaseFacts(
        tokenizer=tokenizer,
        context_tokens=get_context_tokens(config, tokenizer),
        end_tokens=_end_tokens(read_generation_config(place, whole), tokenizer),
        vocab_size=_size(config, "vocab_size"),
        num_layers=_size(config, "num_hidden_layers"),
        width=_size(config, "hidden_size"),
    )


def facts_of(base: "Base") -> BaseFacts:
    """Return the facts of a loaded base."""
    embedding: Any = base.model.get_input_embeddings()
    return BaseFacts(
        tokenizer=base.tokenizer,
        context_tokens=base.identity.context_tokens,
        end_tokens=_end_tokens(base.model.generation_config, base.tokenizer),
        vocab_size=int(embedding.weight.shape[0]),
        num_layers=base.identity.num_layers,
        width=base.identity.width,
    )


def get_context_tokens(config: Any, tokenizer: Tokenizer) -> int:  # noqa: ANN401 -- any config
    """Return the context length that a config of text names, or else its tokenizer."""
    values = [getattr(config, name, None) for name in _CONTEXT_NAMES]
    stated = [value for value in values if isinstance(value, int)]
    if not stated and tokenizer.model_max_length < NO_CONTEXT_LIMIT:
        stated = [int(tokenizer.model_max_length)]
    return stated[0] if stated and stated[0] > 0 else NO_CONTEXT_LIMIT


def _end_tokens(generation: GenerationConfig | None, tokenizer: Tokenizer) -> tuple[int, ...]:
    ids = end_ids(generation)
    ends = [*ids, *([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)])]
    return tuple(dict.fromkeys(ends))


def end_ids(generation: GenerationConfig | None) -> list[int]:
    """Return the token ids that end generation by a generation config.

    Raises:
        InputError: one is no token id.
    """
    ids = getattr(generation, "eos_token_id", None)
    listed = ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
    return [check_token_id("eos_token_id", each) for each in listed]


def check_token_id(name: str, value: Any) -> int:  # noqa: ANN401 -- of a file of the base
    """Return a token id of a base's generation config.

    Raises:
        InputError: it is none.
    """
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise InputError(
            f"generation_config.json of the base: {name}: expected a token id, got {value!r:.80}"
        )
    return value


def _size(config: Any, name: str) -> int | None:  # noqa: ANN401 -- any config
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None
