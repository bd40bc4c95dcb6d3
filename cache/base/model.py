"""The frozen base: loaded, checked, never changed.

A base is any causal LM that transformers loads and whose parts `architecture.py` finds. It is
read in the dtype of its checkpoint; computing in float32 widens those values and nothing else.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from carryon.cache.base.architecture import Architecture, get_architecture, read_norm
from carryon.cache.base.identity import (
    BaseIdentity,
    digest_chat_template,
    digest_config,
    digest_tokenizer,
    digest_weights,
)
from carryon.cache.base.lm_head import Head
from carryon.cache.base.loading import (
    BaseSource,
    locate_base,
    read_checkpoint_dtype,
    read_model,
    read_tokenizer,
)
from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings

__all__ = ["NO_CONTEXT_LIMIT", "Base", "BaseIdentity", "load_base", "load_tokenizer", "read_head"]

NO_CONTEXT_LIMIT = 1 << 30
"""`context_tokens` of a base whose config names no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A loaded base."""

    source: str
    """What the user gave: hub id, folder or .gguf file."""
    model: PreTrainedModel
    """In evaluation mode, without gradients."""
    tokenizer: Tokenizer
    """The base's own tokenizer."""
    identity: BaseIdentity
    """Who it is."""
    architecture: Architecture
    """Where its parts are."""
    device: torch.device
    """Where it runs."""
    compute_dtype: torch.dtype
    """What it computes in."""
    checkpoint_dtype: torch.dtype
    """What its weights are saved in."""
    attention: str
    """Attention backend in force: `eager` where `sdpa` was asked of a base that has none."""


def load_tokenizer(source: str) -> Tokenizer:
    """Return the tokenizer of a base given as hub id, folder or .gguf file.

    Raises:
        MissingError: there is no such base.
        InputError: it has no tokenizer that transformers can load.
        MissingExtraError: a .gguf file without the package gguf.
    """
    return read_tokenizer(locate_base(source))


def load_base(source: str, *, forward: ForwardSettings) -> Base:
    """Load a frozen base, ready to run.

    Args:
        source: hub id (`name/repo` or `name/repo@revision`), folder, or .gguf file.
        forward: device, compute dtype and attention backend.

    Raises:
        MissingError: there is no such base.
        InputError: it is not a causal LM that a store can be made from, or the device, dtype or
            attention backend does not exist here.
        MissingExtraError: a .gguf file without the package gguf.
    """
    place = locate_base(source)
    device = _pick_device(forward.device)
    compute_dtype = _pick_compute_dtype(forward.compute_dtype, device)
    tokenizer = read_tokenizer(place)
    own_dtype = read_checkpoint_dtype(place)
    model = read_model(place, dtype=own_dtype, device=device, attention=forward.attention)
    checkpoint_dtype: torch.dtype = model.dtype
    weights_sha256 = digest_weights(model)  # before any change of dtype
    if compute_dtype != checkpoint_dtype:
        if place.gguf_file is not None and compute_dtype == torch.float32:
            # Loading as float32 would skip the rounding that was just hashed.
            nn.Module.to(model, dtype=compute_dtype)
        else:
            del model
            model = read_model(
                place, dtype=compute_dtype, device=device, attention=forward.attention
            )
    model.requires_grad_(False)
    architecture = get_architecture(model)
    return Base(
        source=source,
        model=model,
        tokenizer=tokenizer,
        identity=_identify(place, model, architecture, tokenizer, weights_sha256),
        architecture=architecture,
        device=device,
        compute_dtype=compute_dtype,
        checkpoint_dtype=checkpoint_dtype,
        attention=str(model.config.get_text_config()._attn_implementation),
    )


def read_head(base: Base) -> Head:
    """Return the base's head and final norm as numpy values.

    The weight keeps the checkpoint's dtype where the base computes in float32 (the same values),
    and has the compute dtype otherwise; uint16 holds bfloat16 bits.
    """
    head = base.architecture.head
    widened = base.compute_dtype == torch.float32
    dtype = base.checkpoint_dtype if widened else base.compute_dtype
    bias = None if head.bias is None else head.bias.float().cpu().numpy()
    return Head(
        weight=_to_bits(head.weight.detach().to(dtype)),
        bias=bias,
        logit_scale=base.architecture.logit_scale,
        softcap=base.architecture.softcap,
        norm=read_norm(base.architecture.norm, width=base.identity.width),
    )


def _identify(
    place: BaseSource,
    model: PreTrainedModel,
    architecture: Architecture,
    tokenizer: Tokenizer,
    weights_sha256: str,
) -> BaseIdentity:
    return BaseIdentity(
        id=place.id,
        revision=getattr(model.config, "_commit_hash", None),
        architecture=type(model).__name__,
        num_layers=len(architecture.blocks),
        width=architecture.head.in_features,
        vocab_size=architecture.head.out_features,
        context_tokens=_read_context_tokens(model.config.get_text_config(), tokenizer),
        config_sha256=digest_config(model.config),
        weights_sha256=weights_sha256,
        tokenizer_sha256=digest_tokenizer(tokenizer),
        chat_template_sha256=digest_chat_template(tokenizer),
    )


def _to_bits(
    weight: torch.Tensor,
) -> NDArray[np.uint16] | NDArray[np.float16] | NDArray[np.float32]:
    weight = weight.contiguous().cpu()
    is_bfloat16 = weight.dtype == torch.bfloat16  # numpy has no such type
    bits: NDArray[np.uint16] = (weight.view(torch.uint16) if is_bfloat16 else weight).numpy()
    return bits


def _pick_device(name: str) -> torch.device:
    if name == "auto":
        from accelerate import PartialState

        found: torch.device = PartialState().device
        return found
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device {name!r}: expected auto, cpu or an accelerator of this machine: {reason}"
        ) from error
    return device


def _pick_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    return torch.bfloat16 if _has_native_bfloat16(device) else torch.float32


def _has_native_bfloat16(device: torch.device) -> bool:
    """Tell whether the device multiplies bfloat16 in hardware.

    Where a CPU emulates it, bfloat16 was 5 times slower than float32 (135M base, AVX2).
    """
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return True


def _read_context_tokens(config: Any, tokenizer: Tokenizer) -> int:  # noqa: ANN401 -- any config
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    stated = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    if not stated and tokenizer.model_max_length < NO_CONTEXT_LIMIT:
        stated = [int(tokenizer.model_max_length)]
    return stated[0] if stated and stated[0] > 0 else NO_CONTEXT_LIMIT
