"""The frozen base: loaded and checked.

A base is any causal LM that transformers loads and whose parts `architecture.py` finds. Its digest
is that of the weights in the dtype that its config names; computing in float32 only widens them.
Where the files hold wider values than the config says, float32 computes with those of the files,
and the digest is that of the rounded ones.
"""

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from carryon.cache.base.architecture import Architecture, get_architecture, read_norm
from carryon.cache.base.facts import get_context_tokens
from carryon.cache.base.identity import (
    BaseIdentity,
    digest_all_but_weights,
    digest_weights,
    refuse_other_digests,
)
from carryon.cache.base.lm_head import Head
from carryon.cache.base.loading import (
    BaseSource,
    is_quantized,
    locate_base,
    read_checkpoint_dtype,
    read_config,
    read_model,
    read_tokenizer,
    say_slow,
)
from carryon.cache.base.saved_weights import digest_checkpoint
from carryon.cache.device import multiplies_bfloat16, pick_device
from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """A loaded base."""

    source: str
    """Hub id, folder or .gguf file, as the user gave it."""
    model: PreTrainedModel
    """In evaluation mode, without gradients."""
    tokenizer: Tokenizer
    """The base's own tokenizer."""
    identity: BaseIdentity
    """Its digests and sizes."""
    architecture: Architecture
    """Its parts."""
    device: torch.device
    """Where it runs."""
    compute_dtype: torch.dtype
    """Dtype of its weights and states as it runs."""
    checkpoint_dtype: torch.dtype
    """Dtype of its weights as they are saved."""
    attention: str
    """Attention backend in force: `eager` where `sdpa` was set for a base that has none."""


def load_base(
    source: str,
    *,
    forward: ForwardSettings,
    expected: Mapping[str, Any] | None = None,
    like: str | None = None,
) -> Base:
    """Load a frozen base, ready to run. No code and, unless allowed, no pickle of it is read.

    Args:
        source: hub id (`name/repo` or `name/repo@revision`), folder, or .gguf file.
        forward: device, compute dtype and attention backend.
        expected: digests that it must have, by their names in BaseIdentity. None: any.
        like: digest of a recorded tokenizer, as of `read_tokenizer`. None: the expected one.

    Raises:
        SettingMismatchError: it has another digest than an expected one.
        MissingError: there is no such base.
        InputError: it is not a causal LM that a store can be made from, or the device, dtype or
            attention backend does not exist here.
        MissingExtraError: a .gguf file without the package gguf.
    """
    place = locate_base(source)
    device = pick_device(forward.device)
    compute_dtype = _pick_compute_dtype(forward.compute_dtype, device)
    say_slow(source, gguf_file=place.gguf_file)
    tokenizer = read_tokenizer(place, like=like or (expected or {}).get("tokenizer_sha256"))
    if expected is not None:
        digests = digest_all_but_weights(read_config(place), tokenizer)
        refuse_other_digests(expected, digests, where=f"base {source}")
    model, checkpoint_dtype, weights_sha256 = _read_model(
        place, forward, device=device, compute_dtype=compute_dtype
    )
    if expected is not None:
        found = {"weights_sha256": weights_sha256}
        refuse_other_digests(expected, found, where=f"base {source}")
    model.requires_grad_(False)
    architecture = get_architecture(model)
    return Base(
        source=source,
        model=model,
        tokenizer=tokenizer,
        identity=_identity(place, model, architecture, tokenizer, weights_sha256),
        architecture=architecture,
        device=device,
        compute_dtype=compute_dtype,
        checkpoint_dtype=checkpoint_dtype,
        attention=str(model.config.get_text_config()._attn_implementation),
    )


def _read_model(
    place: BaseSource, forward: ForwardSettings, *, device: torch.device, compute_dtype: torch.dtype
) -> tuple[PreTrainedModel, torch.dtype, str]:
    """Return the model in `compute_dtype`, and dtype and digest of its weights as saved.

    The weights are read once, in `compute_dtype`, where the dtype of the checkpoint is known.
    """
    how: dict[str, Any] = {
        "device": device,
        "attention": forward.attention,
        "allow_pickle": forward.allow_pickle,
    }
    saved_dtype = read_checkpoint_dtype(place)
    is_plain = place.gguf_file is None and not is_quantized(place)
    if isinstance(saved_dtype, torch.dtype) and is_plain:
        model = read_model(place, dtype=compute_dtype, **how)
        digest = _digest_as_saved(model, place, compute_dtype=compute_dtype, dtype=saved_dtype)
        if digest is None:
            digest = digest_weights(read_model(place, dtype=saved_dtype, **how))
        return model, saved_dtype, digest
    model = read_model(place, dtype=saved_dtype, **how)
    checkpoint_dtype: torch.dtype = model.dtype
    weights_sha256 = digest_weights(model)  # before any change of dtype
    if compute_dtype != checkpoint_dtype:
        if place.gguf_file is not None and compute_dtype == torch.float32:
            # Loading as float32 would skip the rounding that was just hashed.
            nn.Module.to(model, dtype=compute_dtype)
        else:
            del model
            model = read_model(place, dtype=compute_dtype, **how)
    if model.dtype != compute_dtype:  # such as FP8, which is unpacked to bfloat16 alone
        names = [str(each).removeprefix("torch.") for each in (compute_dtype, model.dtype)]
        raise InputError(
            f"base {place.name}: expected a quantized checkpoint that is computed in {names[0]}, "
            f"got one that transformers loads in {names[1]}. Fix: --compute-dtype {names[1]}"
        )
    return model, checkpoint_dtype, weights_sha256


def _digest_as_saved(
    model: PreTrainedModel,
    place: BaseSource,
    *,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
) -> str | None:
    """Return the digest of the weights as saved in `dtype`; None where only loading them tells."""
    if compute_dtype == dtype:
        return digest_weights(model)
    if model._get_dtype_plan(compute_dtype) or not _is_all_in(dtype, model):
        return None  # some weights are kept in float32
    if compute_dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16):
        # Every value was widened and is narrowed again; the bits of a NaN would be others.
        return digest_weights(model, dtype=dtype) if _has_numbers(model) else None
    return digest_checkpoint(model, place, dtype=dtype)


def _is_all_in(dtype: torch.dtype, model: PreTrainedModel) -> bool:
    """Return whether the same base loaded in `dtype` has every weight in it."""
    if model._get_dtype_plan(dtype):
        return False
    kind: Any = type(model)
    config: Any = copy.deepcopy(model.config)
    config.dtype = dtype
    with ExitStack() as as_loaded:  # without memory for the weights
        for context in kind.get_init_context(dtype, False, False, None):
            as_loaded.enter_context(context)
        other: PreTrainedModel = kind(config)
    weights = filter(Tensor.is_floating_point, other.state_dict().values())
    return {weight.dtype for weight in weights} == {dtype}


def _has_numbers(model: PreTrainedModel) -> bool:
    weights = filter(Tensor.is_floating_point, model.state_dict().values())
    return all(bool(torch.isfinite(weight.sum())) for weight in weights)


def _identity(
    place: BaseSource,
    model: PreTrainedModel,
    architecture: Architecture,
    tokenizer: Tokenizer,
    weights_sha256: str,
) -> BaseIdentity:
    config = model.config.get_text_config()
    return BaseIdentity(
        id=place.id,
        revision=getattr(model.config, "_commit_hash", None),
        architecture=type(model).__name__,
        num_layers=len(architecture.blocks),
        width=architecture.head.in_features,
        vocab_size=architecture.head.out_features,
        context_tokens=get_context_tokens(config, tokenizer),
        weights_sha256=weights_sha256,
        **digest_all_but_weights(model.config, tokenizer),
    )


def read_head(base: Base) -> Head:
    """Return the base's head and final norm as numpy values.

    The weight keeps the checkpoint's dtype where the base computes in float32 (the same values if
    the files hold no wider ones), and has the compute dtype otherwise; uint16 holds bfloat16 bits.
    """
    head = base.architecture.head
    is_widened = base.compute_dtype == torch.float32
    dtype = base.checkpoint_dtype if is_widened else base.compute_dtype
    weight = head.weight.detach().to(dtype).contiguous().cpu()
    is_bfloat16 = dtype == torch.bfloat16  # which numpy lacks
    bits: NDArray[Any] = (weight.view(torch.uint16) if is_bfloat16 else weight).numpy()
    bias: NDArray[np.float32] | None = (
        None if head.bias is None else head.bias.float().cpu().numpy()
    )
    return Head(
        weight=bits,
        bias=bias,
        logit_scale=base.architecture.logit_scale,
        softcap=base.architecture.softcap,
        norm=read_norm(base.architecture.norm, width=base.identity.width),
    )


def _pick_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name`; `auto`: bfloat16 where the device multiplies it.

    Where a CPU emulates it, bfloat16 was 5 times slower than float32 (135M base, AVX2).
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    is_native = device.type not in ("cpu", "cuda") or multiplies_bfloat16(device)
    return torch.bfloat16 if is_native else torch.float32
