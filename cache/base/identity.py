"""The identity of a base: digests of its weights, config, tokenizer and chat template.

Two bases with equal digests compute the same hidden states from the same text. Paths and hub ids
are recorded for people and for finding the base; they are not compared. Imports without torch.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carryon.cache.errors import InputError, SettingMismatchError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from carryon.cache.base.weights.offloaded import Weight

MAX_TOKEN_ID = 1 << 24
ON_LOAD = ("nf4", "int8", "fp8")
"""Ways to quantize a dense base when it is loaded."""
PIECE_ITEMS = 1 << 16
"""Numbers of a weight that are hashed at one time. With 64 times as many, copies in another dtype
left 170 MB behind in the C allocator, and took longer."""
_NOT_COMPUTED_WITH = {
    "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "is_decoder",
    "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type",
    "quantization_config", "return_dict", "sep_token_id", "tie_word_embeddings", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip
"""Config entries about loading, generation and training, which change no hidden state. The same
base as GGUF and as safetensors differs in some of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseIdentity:
    """What a store records of its base."""

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
    """Context length; `NO_CONTEXT_LIMIT` for a base whose config names none."""
    config_sha256: str
    weights_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str | None
    """None where the tokenizer has no chat template."""
    quantization: str | None = None
    """`nf4`, `int8` or `fp8` where weights were quantized on load; method and type of a checkpoint
    that is quantized, such as `gptq-4bit`. None: dense."""
    code_sha256: str | None = None
    """Of Python code that comes with it and was allowed to run. None: none was."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; what most bases lack is left out where it is None."""
        optional = ("quantization", "code_sha256")
        return {
            name: value
            for name, value in asdict(self).items()
            if value is not None or name not in optional
        }


def digest_weights(model: "nn.Module", *, dtype: "torch.dtype | None" = None) -> str:
    """Return the SHA-256 (hex) over name, shape, dtype and bytes of every saved tensor.

    Tensors come in the order of their names, a tied tensor once, under its first name. Each is
    hashed separately, so that the work is spread over the CPU cores, and in pieces: no second copy
    of a tensor is made.

    Args:
        model: its weights are in memory.
        dtype: in which numbers are hashed. Weights that were widened when they were loaded have, in
            the dtype of their checkpoint, its bytes. None: the dtype of each.
    """
    with ThreadPoolExecutor() as pool:
        tensors = saved_tensors(model)
        lines = pool.map(lambda item: _digest_tensor(*item, dtype=dtype), tensors.items())
        return join_digests(lines)


def saved_tensors(model: "nn.Module") -> dict[tuple[str, ...], "Weight"]:
    """Return the tensors of a model in the order of their names, a tied one under all its names.

    Of a base that is spread over devices some are in files, and a tied one may be on several.
    """
    from carryon.cache.base.weights.offloaded import kept_weight, place_of

    is_spread = hasattr(model, "_hf_hook")
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    named: dict[object, tuple[list[str], Weight]] = {}
    for name, tensor in sorted(model.state_dict().items()):
        weight = kept_weight(model, name) if tensor.is_meta else tensor
        key: object = place_of(weight)
        if is_spread and (name in tied or name in tied.values()):
            key = tied.get(name, name)
        names, _ = named.setdefault(key, ([], weight))
        names.append(name)
    return {tuple(names): weight for names, weight in named.values()}


def digest_pieces(
    name: str, shape: Iterable[int], dtype: "torch.dtype", pieces: Iterable["Tensor"]
) -> str:
    """Return the line of one tensor in the digest of all: `pieces` are its values, in order."""
    import torch

    digest = hashlib.sha256()
    for piece in pieces:
        flat = piece.detach().to(dtype).contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).cpu().numpy().data)
    return f"{name} {tuple(shape)} {dtype} {digest.hexdigest()}"


def join_digests(lines: Iterable[str]) -> str:
    """Return the digest of all tensors from the lines of each."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digest_config(config: "PretrainedConfig") -> str:
    """Return the SHA-256 (hex) of the config's entries that determine the computation.

    Private entries and `_NOT_COMPUTED_WITH` are left out, at every depth.
    """
    return _digest_json(_computed_with(config.to_dict()))


def check_token_ids(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer with huge ids: its library ends the process when it writes their holes.

    Raises:
        InputError: a token id is beyond those of any base.
    """
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest > MAX_TOKEN_ID:
        raise InputError(
            f"tokenizer of the base: expected token ids up to {MAX_TOKEN_ID:,}, got {largest:,}"
        )


def digest_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return the SHA-256 (hex) of the rules by which text becomes token ids.

    Truncation and padding are left out: they are settings of a call.

    Raises:
        InputError: a token id is beyond those of any base.
    """
    check_token_ids(tokenizer)
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    return _digest_json(rules)


def recorded_normalizer(tokenizer: "PreTrainedTokenizerBase", digest: str) -> str | None:
    """Return the normalizer of the recorded tokenizer if nothing else differs: "NFC" or "".

    None: it is equal, or another one. A base in a .gguf file has no normalizer where transformers
    gives the same base in a folder one.

    Args:
        tokenizer: of a base.
        digest: recorded of a tokenizer, by `digest_tokenizer`.
    """
    if not tokenizer.is_fast or digest_tokenizer(tokenizer) == digest:
        return None
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    for name, normalizer in (("NFC", {"type": "NFC"}), ("", None)):
        if _digest_json(rules | {"normalizer": normalizer}) == digest:
            return name
    return None


def digest_all_but_weights(
    config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """Return the digests of config, tokenizer and chat template, by their names in BaseIdentity."""
    return {
        "config_sha256": digest_config(config),
        "tokenizer_sha256": digest_tokenizer(tokenizer),
        "chat_template_sha256": digest_chat_template(tokenizer),
    }


def digest_chat_template(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return the SHA-256 (hex) of the chat template, or None where there is none."""
    template = tokenizer.chat_template
    return None if template is None else _digest_json(template)


def refuse_other_digests(
    expected: Mapping[str, Any], got: Mapping[str, Any], *, where: str
) -> None:
    """Compare the digests of a base with recorded ones; those not in `got` are left out.

    Raises:
        SettingMismatchError: names the first that differs, with both values.
    """
    for key, value in expected.items():
        if key in got and got[key] != value:
            name = key.removesuffix("_sha256").replace("_", " ")
            raise SettingMismatchError(
                f"{where}: expected the recorded {name} ({str(value)[:12]}), got another "
                f"({str(got[key])[:12]}), of which nothing was used. Fix: give the right base with "
                "--base"
            )


def refuse_other_quantization(
    expected: Mapping[str, Any], got: Mapping[str, Any], *, where: str | Path
) -> None:
    """Compare how the weights of two bases are quantized; a missing key is a dense base.

    Raises:
        SettingMismatchError: names both.
    """
    recorded, given = expected.get("quantization"), got.get("quantization")
    if recorded != given:
        fix = "give the right base with --base"
        if recorded in ON_LOAD:
            fix = f"--quantize {recorded}"
        elif recorded is None and given in ON_LOAD:
            fix = "leave out --quantize"
        raise SettingMismatchError(
            f"{where}: expected the recorded quantization ({recorded or 'none'}), got "
            f"{given or 'none'}: their hidden states differ. Fix: {fix}"
        )


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


def _digest_tensor(names: tuple[str, ...], weight: "Weight", *, dtype: "torch.dtype | None") -> str:
    kept = dtype if dtype is not None and weight.dtype.is_floating_point else weight.dtype
    return digest_pieces(names[0], weight.shape, kept, pieces_of(weight))


def pieces_of(weight: "Weight") -> "Iterator[Tensor]":
    """Yield the values of a weight in order, some at a time."""
    import torch

    if not isinstance(weight, torch.Tensor):
        yield from weight.pieces()
        return
    flat = weight.detach().contiguous().reshape(-1)
    for first in range(0, len(flat), PIECE_ITEMS):
        yield flat[first : first + PIECE_ITEMS]


def row_parts(shape: Sequence[int]) -> Iterator[slice]:
    """Yield the parts of a tensor's rows that are read at one time."""
    if not shape:
        yield slice(None)
        return
    rows = max(1, PIECE_ITEMS * shape[0] // max(1, math.prod(shape)))
    for first in range(0, shape[0], rows):
        yield slice(first, min(first + rows, shape[0]))  # safetensors takes none beyond


def _digest_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
