"""Who a base is: the digests by which a store or a carry-on knows its base again.

Two bases with equal digests compute the same hidden states from the same text. Paths and hub ids
are kept for people and for finding the base again; they prove nothing. Imports without torch.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from carryon.cache.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_NOT_COMPUTED_WITH = {
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "quantization_config",
    "return_dict",
    "sep_token_id",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Entries of a config that say how a base is found, loaded, generated with or trained, and change
no hidden state; the weights have a digest of their own. The same base as GGUF and as safetensors
differs in some of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseIdentity:
    """What is recorded of a base, as plain JSON values."""

    id: str
    """Hub id without the revision, or the absolute path of a folder or .gguf file."""
    revision: str | None
    """Commit of the hub repository, or None for a local base."""
    architecture: str
    """Name of the model's class in transformers."""
    num_layers: int
    """Number of blocks."""
    width: int
    """D, the width of the hidden states."""
    vocab_size: int
    """V, the rows of the head."""
    context_tokens: int
    """Longest sequence that the base is made for, in tokens; a very large number for a base
    that names no limit."""
    config_sha256: str
    """See `digest_config`."""
    weights_sha256: str
    """See `digest_weights`."""
    tokenizer_sha256: str
    """See `digest_tokenizer`."""
    chat_template_sha256: str | None
    """Digest of the chat template, or None where the tokenizer has none."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BaseIdentity":
        """Build from plain values.

        Raises:
            InputError: a field is missing, or a key is not a field.
        """
        names = {item.name for item in fields(cls)}
        if set(values) != names:
            raise InputError(
                f"identity of a base: expected the fields {', '.join(sorted(names))}, "
                f"got {', '.join(sorted(values))}"
            )
        return cls(**values)


def digest_weights(model: "nn.Module") -> str:
    """Return the SHA-256 (hex) of everything the model loads from its checkpoint.

    Covered: name, shape, dtype and bytes of each parameter and each buffer that is saved, in the
    order of the names, a tied tensor once, under its first name. Each tensor is hashed by itself,
    so the work spreads over the CPU cores, and then the digests.
    """
    seen: set[tuple[int, tuple[int, ...]]] = set()
    named: list[tuple[str, Tensor]] = []
    for name, tensor in sorted(model.state_dict().items()):
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place not in seen:
            seen.add(place)
            named.append((name, tensor))
    with ThreadPoolExecutor() as pool:
        lines = pool.map(lambda item: _digest_tensor(*item), named)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digest_config(config: "PretrainedConfig") -> str:
    """Return the SHA-256 (hex) of what a config says of the computation: widths, epsilons, rope.

    Private entries, defaults of loading and token ids are left out, at every depth.
    """
    return _digest_json(_computed_with(config.to_dict()))


def digest_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 (hex) of how the tokenizer turns text into token ids.

    Truncation and padding are left out: they are settings of a call, not of the vocabulary.
    """
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return _digest_json(rules)


def digest_chat_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the SHA-256 (hex) of the chat template, or None where there is none."""
    template = tokenizer.chat_template
    return None if template is None else _digest_json(template)


def _computed_with(value: object) -> object:
    if isinstance(value, Mapping):
        return {
            str(key): _computed_with(item)
            for key, item in value.items()
            if str(key) not in _NOT_COMPUTED_WITH and not str(key).startswith("_")
        }
    if isinstance(value, list | tuple):
        return [_computed_with(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _digest_tensor(name: str, tensor: "Tensor") -> str:
    import torch

    # One tensor at a time comes to the CPU, at most one for each thread.
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    digest = hashlib.sha256(data.data).hexdigest()
    return f"{name} {tuple(tensor.shape)} {tensor.dtype} {digest}"


def _digest_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
