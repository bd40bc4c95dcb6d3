"""The frozen base: loaded and checked.

A base is any causal LM that transformers loads and whose parts `architecture.py` finds. Its digest
is that of the weights in the dtype that its config names; computing in float32 only widens them.
Where the files hold wider values than the config says, float32 computes with those of the files,
and the digest is that of the rounded ones. It may be spread over devices, which changes no value,
or quantized, which makes it another base.
"""

import copy
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase as Tokenizer

from carryon.cache.base.architecture import Architecture, get_architecture, read_norm
from carryon.cache.base.calibration.compute_dtype import pick_compute_dtype
from carryon.cache.base.facts import get_context_tokens
from carryon.cache.base.identity import (
    BaseIdentity,
    digest_all_but_weights,
    digest_weights,
    refuse_other_digests,
    refuse_other_quantization,
)
from carryon.cache.base.lm_head import Head
from carryon.cache.base.loading import (
    read_checkpoint_dtype,
    read_config,
    read_model,
    read_tokenizer,
    say_slow,
)
from carryon.cache.base.placement import (
    Placement,
    check_ties,
    input_device,
    log_places,
    offload_folder,
    plan_placement,
    remove_with,
    weights_of,
)
from carryon.cache.base.pretrained import PreTrainedModel
from carryon.cache.base.quantizers import (
    check_quantized,
    checkpoint_quantization,
    import_quantizer,
    quantizer_of,
)
from carryon.cache.base.source.location import BaseSource, locate_base
from carryon.cache.base.source.own_code import digest_code, refuse_other_code
from carryon.cache.base.weights.saved import digest_checkpoint, digest_files
from carryon.cache.device import returning_freed_memory
from carryon.cache.errors import CarryOnError, InputError
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
    """Where it reads token ids; where it runs, unless it is spread over several."""
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
    """Load a frozen base, ready to run. Unless allowed, no code and no pickle of it is read.

    Args:
        source: hub id (`name/repo` or `name/repo@revision`), folder, or .gguf file.
        forward: devices, compute dtype, quantization and attention backend.
        expected: digests that it must have, by their names in BaseIdentity. None: any.
        like: digest of a recorded tokenizer, as of `read_tokenizer`. None: the expected one.

    Raises:
        SettingMismatchError: it has another digest than an expected one, or other quantization.
        MissingError: there is no such base.
        InputError: it is not a causal LM that a store can be made from, or the devices, dtype,
            quantization or attention backend do not exist here.
        MissingExtraError: a .gguf file without the package gguf, or a quantization without its own.
    """
    place = locate_base(source, trusts_code=forward.trust_remote_code)
    placement = plan_placement(forward)
    say_slow(source, gguf_file=place.gguf_file)
    code_sha256 = digest_code(place) if place.trusts_code else None
    if expected is not None:
        where = f"base {source}"
        refuse_other_code(expected, code_sha256, trusts=place.trusts_code, where=where)
    tokenizer = read_tokenizer(place, like=like or (expected or {}).get("tokenizer_sha256"))
    config = read_config(place)
    quantization = _quantization(place, checkpoint_quantization(config), forward)
    if expected is not None:
        refuse_other_quantization(expected, {"quantization": quantization}, where=where)
        digests = digest_all_but_weights(config, tokenizer)
        refuse_other_digests(expected, digests, where=where)
    dtype = pick_compute_dtype(place, config, forward, placement, quantization=quantization)
    loaded = _read_weights(place, forward, placement, dtype=dtype, quantization=quantization)
    model, compute_dtype, checkpoint_dtype, weights_sha256 = loaded
    if expected is not None:
        refuse_other_digests(expected, {"weights_sha256": weights_sha256}, where=where)
    model.requires_grad_(False)
    architecture = _architecture(model, source, quantization)
    if quantization is not None:
        check_quantized(model, architecture.head, quantization=quantization, name=source)
    log_places(model, name=source)
    identity = _identity(place, model, architecture, tokenizer, weights_sha256)
    return Base(
        source=source,
        model=model,
        tokenizer=tokenizer,
        identity=replace(identity, quantization=quantization, code_sha256=code_sha256),
        architecture=architecture,
        device=input_device(model),
        compute_dtype=compute_dtype,
        checkpoint_dtype=checkpoint_dtype,
        attention=str(model.config.get_text_config()._attn_implementation),
    )


def _quantization(place: BaseSource, saved: str | None, forward: ForwardSettings) -> str | None:
    """Return how the weights are quantized, in the checkpoint or on load; None for dense ones."""
    if place.gguf_file is not None and (forward.quantize != "none" or forward.device_map):
        option = "--device-map" if forward.device_map else "--quantize"
        raise InputError(
            f"base {place.id}: expected a folder or hub id with {option}, got a .gguf file, which "
            f"is unpacked whole in memory. Fix: carryon convert {place.id} --out FOLDER, once"
        )
    if saved is not None and forward.quantize != "none":
        raise InputError(
            f"base {place.name}: expected dense weights to quantize, got a checkpoint that is "
            f"quantized ({saved}). Fix: leave out --quantize"
        )
    return saved if forward.quantize == "none" else forward.quantize


def _architecture(model: PreTrainedModel, source: str, quantization: str | None) -> Architecture:
    """Return the parts of the model; kernels of quantized weights may fail as they first run."""
    try:
        return get_architecture(model)
    except CarryOnError:
        raise
    except Exception as error:
        if quantization is None:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise InputError(
            f"base {source}: expected quantized weights ({quantization}) that run on "
            f"{input_device(model)}, got: {reason}. Fix: another --compute-dtype, --quantize or "
            "--device"
        ) from error


def _read_weights(
    place: BaseSource,
    forward: ForwardSettings,
    placement: Placement,
    *,
    dtype: torch.dtype,
    quantization: str | None,
) -> tuple[PreTrainedModel, torch.dtype, torch.dtype, str]:
    """Return the model, the dtypes in which it computes and is saved, and the weights' digest."""
    with offload_folder(placement) as folder:
        how: dict[str, Any] = {
            "device": placement.device_map,
            "attention": forward.attention,
            "allow_pickle": forward.allow_pickle,
        }
        if placement.max_memory is not None:
            how["max_memory"] = placement.max_memory
        if folder is not None:
            how["offload_folder"] = str(folder)
        if quantization is None:
            model, saved_dtype, digest = _read_model(place, how, compute_dtype=dtype)
        else:
            saved = read_checkpoint_dtype(place)
            saved_dtype = saved if isinstance(saved, torch.dtype) else dtype
            if quantization.startswith("bitsandbytes") and find_spec("bitsandbytes"):
                import_quantizer("bitsandbytes", purpose=f"base {place.name}")
            if forward.quantize != "none":
                how["quantization_config"] = quantizer_of(forward.quantize, dtype)
            with returning_freed_memory():
                model = _load(place, dtype, how)
            if forward.compute_dtype == "auto":  # unpacked to a dtype of its own
                dtype = model.dtype
            _check_dtype(model, place, dtype)
            if quantization == "bitsandbytes-int8" and dtype == torch.float32:
                raise InputError(
                    f"base {place.name}: expected 8-bit weights of bitsandbytes beside others in "
                    "bfloat16, got float32: outliers are looked for in the whole batch, which "
                    "changes states. Fix: give the dense checkpoint, with --quantize int8"
                )
            digest = digest_files(place, quantization=quantization)
        if folder is not None:
            remove_with(model, folder)
    return model, dtype, saved_dtype, digest


def _read_model(
    place: BaseSource, how: dict[str, Any], *, compute_dtype: torch.dtype
) -> tuple[PreTrainedModel, torch.dtype, str]:
    """Return a dense model in `compute_dtype`, and dtype and digest of its weights as saved.

    The weights are read once, in `compute_dtype`, where the dtype of the checkpoint is known.
    """
    saved_dtype = read_checkpoint_dtype(place)
    if isinstance(saved_dtype, torch.dtype) and place.gguf_file is None:
        is_same = compute_dtype == saved_dtype
        with nullcontext() if is_same else returning_freed_memory():
            model = _load(place, compute_dtype, {**how, "maps_files": is_same})
        digest = _digest_as_saved(model, place, compute_dtype=compute_dtype, dtype=saved_dtype)
        if digest is None:
            digest = _digest_again(place, saved_dtype, how)
        return model, saved_dtype, digest
    model = _load(place, saved_dtype, how)
    checkpoint_dtype: torch.dtype = model.dtype
    weights_sha256 = digest_weights(model)  # before any change of dtype
    if compute_dtype != checkpoint_dtype:
        if place.gguf_file is not None and compute_dtype == torch.float32:
            # Loading as float32 would skip the rounding that was just hashed.
            nn.Module.to(model, dtype=compute_dtype)
        else:
            del model
            model = _load(place, compute_dtype, how)
    _check_dtype(model, place, compute_dtype)
    return model, checkpoint_dtype, weights_sha256


def _load(place: BaseSource, dtype: torch.dtype | str, how: Mapping[str, Any]) -> PreTrainedModel:
    model = read_model(place, dtype=dtype, **how)
    check_ties(model)
    return model


def _digest_again(place: BaseSource, dtype: torch.dtype, how: Mapping[str, Any]) -> str:
    """Return the digest of the base loaded once more, apart from what is on disk of the first."""
    folder: str | None = how.get("offload_folder")
    if folder is None:
        return digest_weights(_load(place, dtype, how))
    with TemporaryDirectory(dir=folder) as apart:
        return digest_weights(_load(place, dtype, {**how, "offload_folder": apart}))


def _check_dtype(model: PreTrainedModel, place: BaseSource, dtype: torch.dtype) -> None:
    """Refuse a model in another dtype, such as FP8, which is unpacked to bfloat16 alone."""
    if model.dtype != dtype:
        names = [str(each).removeprefix("torch.") for each in (dtype, model.dtype)]
        raise InputError(
            f"base {place.name}: expected a quantized checkpoint that is computed in {names[0]}, "
            f"got one that transformers loads in {names[1]}. Fix: --compute-dtype {names[1]}"
        )


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
    is_whole = not any(weight.is_meta for weight in model.parameters())
    if compute_dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16) and is_whole:
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
    own = weights_of(head)  # also of a head that is not on its device now
    weight = own["weight"].detach().to(dtype).contiguous().cpu()
    is_bfloat16 = dtype == torch.bfloat16  # which numpy lacks
    bits: NDArray[Any] = (weight.view(torch.uint16) if is_bfloat16 else weight).numpy()
    bias: NDArray[np.float32] | None = (
        None if head.bias is None else own["bias"].float().cpu().numpy()
    )
    return Head(
        weight=bits,
        bias=bias,
        logit_scale=base.architecture.logit_scale,
        softcap=base.architecture.softcap,
        norm=read_norm(base.architecture.norm, width=base.identity.width),
    )
