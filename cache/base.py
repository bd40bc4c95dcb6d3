"""The frozen base: loaded, checked, never changed.

A base is any causal LM that transformers loads and whose parts `carryon.cache.anatomy` finds. It
is read in the dtype of its checkpoint; computing in float32 widens those values and nothing else.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from carryon.cache.anatomy import Anatomy, find_anatomy, read_norm
from carryon.cache.errors import InputError, MissingError
from carryon.cache.extras import require
from carryon.cache.head import Head
from carryon.cache.identity import (
    BaseIdentity,
    digest_chat_template,
    digest_tokenizer,
    digest_weights,
)
from carryon.cache.spec import ForwardSettings

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
    anatomy: Anatomy
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
    return _load_tokenizer(_locate(source))


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
    place = _locate(source)
    device = _pick_device(forward.device)
    compute_dtype = _pick_compute_dtype(forward.compute_dtype, device)
    tokenizer = _load_tokenizer(place)
    own_dtype = _read_checkpoint_dtype(place)
    model = _load_model(place, dtype=own_dtype, device=device, attention=forward.attention)
    checkpoint_dtype: torch.dtype = model.dtype
    weights_sha256 = digest_weights(model)  # before any change of dtype
    if compute_dtype != checkpoint_dtype:
        if place.gguf_file is not None and compute_dtype == torch.float32:
            # Loading as float32 would skip the rounding that was just hashed.
            nn.Module.to(model, dtype=compute_dtype)
        else:
            del model
            model = _load_model(
                place, dtype=compute_dtype, device=device, attention=forward.attention
            )
    model.requires_grad_(False)  # from_pretrained has called eval()
    anatomy = find_anatomy(model)
    identity = BaseIdentity(
        id=place.name if place.gguf_file is None else str(Path(place.name, place.gguf_file)),
        revision=getattr(model.config, "_commit_hash", None),
        architecture=type(model).__name__,
        num_layers=len(anatomy.blocks),
        width=anatomy.head.in_features,
        vocab_size=anatomy.head.out_features,
        context_tokens=_read_context_tokens(model.config.get_text_config(), tokenizer),
        weights_sha256=weights_sha256,
        tokenizer_sha256=digest_tokenizer(tokenizer),
        chat_template_sha256=digest_chat_template(tokenizer),
    )
    return Base(
        source=source,
        model=model,
        tokenizer=tokenizer,
        identity=identity,
        anatomy=anatomy,
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
    head = base.anatomy.head
    widened = base.compute_dtype == torch.float32
    dtype = base.checkpoint_dtype if widened else base.compute_dtype
    bias = None if head.bias is None else head.bias.float().cpu().numpy()
    return Head(
        weight=_to_bits(head.weight.detach().to(dtype)),
        bias=bias,
        logit_scale=base.anatomy.logit_scale,
        softcap=base.anatomy.softcap,
        norm=read_norm(base.anatomy.norm, width=base.identity.width),
    )


def _to_bits(
    weight: torch.Tensor,
) -> NDArray[np.uint16] | NDArray[np.float16] | NDArray[np.float32]:
    weight = weight.contiguous().cpu()
    is_bfloat16 = weight.dtype == torch.bfloat16  # numpy has no such type
    bits: NDArray[np.uint16] = (weight.view(torch.uint16) if is_bfloat16 else weight).numpy()
    return bits


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where transformers finds a base."""

    name: str  # hub id, or absolute path of a folder
    revision: str | None
    gguf_file: str | None
    is_local: bool

    def arguments(self) -> dict[str, Any]:
        """Return what every from_pretrained takes."""
        found = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {key: value for key, value in found.items() if value is not None}


def _locate(source: str) -> _Place:
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"base {source}: expected a folder or a .gguf file, got another file")
        require("gguf", extra="gguf", purpose=f"base {source}")
        folder = str(path.resolve().parent)
        return _Place(name=folder, revision=None, gguf_file=path.name, is_local=True)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"base {source}: expected a folder saved by transformers, but it has no "
                "config.json; give the folder of a model, or the .gguf file itself"
            )
        return _Place(name=str(path.resolve()), revision=None, gguf_file=None, is_local=True)
    looks_like_path = path.is_absolute() or source.startswith(".") or source.count("/") > 1
    if looks_like_path or path.suffix == ".gguf" or not source:
        raise MissingError(
            f"base {source!r}: no such folder or file; give a folder saved by transformers, "
            "a .gguf file or the id of a model on the hub"
        )
    name, _, revision = source.partition("@")
    return _Place(name=name, revision=revision or None, gguf_file=None, is_local=False)


def _load_tokenizer(place: _Place) -> Tokenizer:
    with _loading(place, "tokenizer"):
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(place.name, **place.arguments())
    return tokenizer


def _load_model(
    place: _Place, *, dtype: torch.dtype | str, device: torch.device, attention: str
) -> PreTrainedModel:
    extra: dict[str, Any] = {}
    if place.gguf_file is not None:
        # Without dequantize the weights stay packed: 15 s to load 135M, and not plain tensors.
        extra["quantization_config"] = transformers.GgufConfig(dequantize=True)
    auto: Any = AutoModelForCausalLM
    with _loading(place, "model"):
        model, report = auto.from_pretrained(
            place.name,
            dtype=dtype,
            device_map=device,
            # None: sdpa where the architecture has it, else eager (Gemma 2).
            attn_implementation=None if attention == "sdpa" else attention,
            output_loading_info=True,
            **place.arguments(),
            **extra,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"base {place.name}: expected every weight of {type(model).__name__}, but "
            f"{len(missing)} are not in the checkpoint, the first is {missing[0]}; "
            "they would be random numbers. Give a complete causal LM"
        )
    loaded: PreTrainedModel = model
    return loaded


def _read_checkpoint_dtype(place: _Place) -> torch.dtype | str:
    """Return the dtype that the checkpoint is saved in; `auto` where only its tensors say so."""
    if place.gguf_file is not None:
        return torch.bfloat16  # packed weights have no dtype of their own
    with _loading(place, "config"):
        config = AutoConfig.from_pretrained(place.name, **place.arguments())
    return config.dtype if isinstance(config.dtype, torch.dtype) else "auto"


@contextmanager
def _loading(place: _Place, what: str) -> Iterator[None]:
    """Turn what transformers raises into one line; keep it silent for a local base.

    Progress bars stay on for the hub, where a download may take minutes.
    """
    log: Any = transformers.utils.logging
    verbosity, has_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    if place.is_local:
        log.disable_progress_bar()
    try:
        if place.gguf_file is not None:
            # Its bar obeys no switch. Failures are exceptions, so nothing else is lost.
            with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
                yield
        else:
            yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        if isinstance(error, OSError) and not place.is_local:
            raise MissingError(
                f"base {place.name}: expected a folder, a .gguf file or the id of a model on a "
                f"hub that can be reached; the {what} could not be fetched: {reason}"
            ) from error
        raise InputError(
            f"base {place.name}: expected a causal LM that transformers "
            f"{transformers.__version__} can load; its {what} could not be loaded: {reason}"
        ) from error
    finally:
        log.set_verbosity(verbosity)
        if has_bars:
            log.enable_progress_bar()


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
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return True


def _read_context_tokens(config: Any, tokenizer: Tokenizer) -> int:  # noqa: ANN401 -- any config
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    stated = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    if not stated and tokenizer.model_max_length < NO_CONTEXT_LIMIT:
        stated = [int(tokenizer.model_max_length)]
    return stated[0] if stated and stated[0] > 0 else NO_CONTEXT_LIMIT
