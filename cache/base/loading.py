"""Load tokenizer and model of a base from the hub, a folder or a GGUF file, with transformers.

Errors of transformers become one line. Code that comes with a base runs only where the user says
so, never by asking.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers.normalizers import NFC
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from carryon.cache.base.identity import check_token_ids, recorded_normalizer
from carryon.cache.base.pretrained import PreTrainedModel
from carryon.cache.base.quiet import errors_only
from carryon.cache.base.source.location import BaseSource, locate_base
from carryon.cache.base.weights.files import reading_unmapped
from carryon.cache.errors import CarryOnError, InputError, MissingError

logger = logging.getLogger(__name__)

CONVERSION = "carryon_conversion.json"
"""File in a folder that `conversion.py` has made: its tokenizer.json is read as it is.

transformers would add to it what its model type usually has: to Qwen's, a normalizer (NFC) that
the tokenizer of a .gguf file lacks.
"""


@cache
def say_slow(source: str, *, gguf_file: str | None) -> None:
    """Log, once for each base, that a .gguf file is unpacked at every start."""
    if gguf_file is not None:
        logger.info(
            f"base {source}: unpacking a .gguf file, which takes minutes for a large base at every "
            f"start; carryon convert {source} --out FOLDER, once, makes it load in seconds"
        )


def read_tokenizer(source: BaseSource, *, like: str | None = None) -> Tokenizer:
    """Return the base's tokenizer; raises as `read_model` does.

    Args:
        source: of the base.
        like: digest of a tokenizer that a store or carry-on records. Where only the normalizer
            differs, the recorded one is put in its place, and a note is logged. None: any.
    """
    is_folder = source.is_local and source.gguf_file is None
    is_converted = is_folder and Path(source.name, CONVERSION).is_file()
    reader: Any = PreTrainedTokenizerFast if is_converted else AutoTokenizer
    with _loading(source, "tokenizer"):
        tokenizer: Tokenizer = reader.from_pretrained(source.name, **source.arguments())
    check_token_ids(tokenizer)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise InputError(
            f"tokenizer of the base: model_max_length: expected a number, got "
            f"{tokenizer.model_max_length!a:.80}"
        )
    name = None if like is None else recorded_normalizer(tokenizer, like)
    if name is not None:
        tokenizer.backend_tokenizer.normalizer = NFC() if name else None
        logger.info(
            f"base {source.id}: its tokenizer differs from the recorded one only in its "
            f"normalizer; the recorded one is used: {name or 'none'}"
        )
    return tokenizer


def read_model(
    source: BaseSource,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str | dict[str, Any],
    attention: str,
    allow_pickle: bool = False,
    shows_progress: bool = False,
    maps_files: bool = True,
    **more: Any,  # noqa: ANN401
) -> PreTrainedModel:
    """Return the base's model in evaluation mode, every weight from its checkpoint.

    Args:
        source: of the base.
        dtype: of its weights; `auto` is that of the checkpoint.
        device: to load it to, or a device map.
        attention: backend of transformers; `sdpa` becomes eager where an architecture lacks it.
        allow_pickle: read weights in pickle files too, not in safetensors only.
        shows_progress: show the bars of transformers for a local base too, on a terminal.
        maps_files: leave weights that stay as they are saved in the mapped files. False: the files
            are read, for weights that are all converted.
        more: arguments of transformers that quantize it, or spread it over devices.

    Raises:
        MissingError: it is not on the hub, or the hub cannot be reached.
        InputError: transformers cannot load it as a causal LM, or weights are missing or in
            pickle files.
    """
    if source.gguf_file is not None:
        # Without dequantize the weights stay packed: 15 s to load 135M, and not plain tensors.
        more["quantization_config"] = transformers.GgufConfig(dequantize=True)
    auto: Any = AutoModelForCausalLM
    what = "weights" if allow_pickle else "model"
    reading = nullcontext() if maps_files else reading_unmapped()
    with _loading(source, what, shows_progress=shows_progress), reading:
        model, report = auto.from_pretrained(
            source.name,
            dtype=dtype,
            device_map=device,
            # None: sdpa where the architecture has it, else eager (Gemma 2).
            attn_implementation=None if attention == "sdpa" else attention,
            output_loading_info=True,
            use_safetensors=None if allow_pickle else True,
            # An adapter beside the model is looked for with arguments of its own.
            adapter_kwargs={"local_files_only": True} if source.is_cached_only else None,
            **source.arguments(),
            **more,
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"base {source.name}: expected every weight of {type(model).__name__}, but "
            f"{len(missing)} are not in the checkpoint, the first is {missing[0]}; "
            "they would be random numbers. Give a complete causal LM"
        )
    loaded: PreTrainedModel = model
    return loaded


def read_config(source: BaseSource) -> PreTrainedConfig:
    """Return the base's config; of a .gguf file, from its metadata. Raises as `read_model`."""
    with _loading(source, "config"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.name, **source.arguments())
    for each in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        kernel = getattr(each, "_attn_implementation", None)
        if "/" in str(kernel):  # code on the hub
            raise InputError(
                f"base {source.name}: expected a config without an attention kernel, which is "
                f"code, got {kernel!r:.80}. Fix: take it out of config.json"
            )
    return config


def check_is_there(source: str) -> None:
    """Check that a base is at `source`, as `locate_base`; of one on the hub its config is read."""
    found = locate_base(source)
    if not found.is_local:
        read_config(found)


def read_generation_config(source: BaseSource, config: PreTrainedConfig) -> GenerationConfig:
    """Return the base's generation config; where it has none, what its config says of it."""
    with _loading(source, "generation config"):
        if source.gguf_file is None:
            with suppress(OSError):  # no such file
                return GenerationConfig.from_pretrained(source.name, **source.place())
        return GenerationConfig.from_model_config(config)


def read_checkpoint_dtype(source: BaseSource) -> torch.dtype | str:
    """Return the dtype of the checkpoint; `auto` where only its tensors tell."""
    if source.gguf_file is not None:
        return torch.bfloat16  # packed weights have no dtype
    dtype = read_config(source).dtype
    return dtype if isinstance(dtype, torch.dtype) else "auto"


@contextmanager
def _loading(source: BaseSource, what: str, *, shows_progress: bool = False) -> Iterator[None]:
    """Turn errors of transformers into one line; silence it for a local base.

    Progress bars stay on for the hub, where a download may take minutes, and where asked for.
    """
    log: Any = transformers.utils.logging
    verbosity, has_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    is_silent = (source.is_local and not shows_progress) or not sys.stderr.isatty()
    if is_silent:
        log.disable_progress_bar()
    try:
        with ExitStack() as silence:
            # `placement.py` says where weights are
            silence.enter_context(errors_only("accelerate.big_modeling"))
            if source.gguf_file is not None and is_silent:  # its bar obeys no switch
                silence.enter_context(redirect_stderr(silence.enter_context(open(os.devnull, "w"))))
            yield
    except CarryOnError:
        raise
    except Exception as error:  # whatever transformers makes of files that anyone may have written
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        if "trust_remote_code" in str(error):
            raise InputError(
                f"base {source.name}: expected an architecture that transformers "
                f"{transformers.__version__} has, got one with code of its own, which is not run. "
                "Fix: read its Python files, then --trust-remote-code if you trust them; or give "
                "another base"
            ) from error
        has_pickle = not source.is_local or any(Path(source.name).glob("*.bin"))
        if what == "model" and "safetensors" in reason and has_pickle:
            raise InputError(
                f"base {source.name}: expected weights in safetensors, found none; pickle files "
                "can run code. Fix: save it as safetensors, or --allow-pickle if you trust it"
            ) from error
        if isinstance(error, OSError) and not source.is_local:
            if source.is_cached_only:
                reason = "the hub cannot be reached, and its cache does not hold it"
            raise MissingError(
                f"base {source.name}: expected a folder, a .gguf file or the id of a model on the "
                f"hub; its {what} could not be fetched: {reason}. Fix: check the name, the folder "
                "and the connection"
            ) from error
        raise InputError(
            f"base {source.name}: expected a causal LM that transformers "
            f"{transformers.__version__} can load; its {what} could not be loaded: {reason}"
        ) from error
    finally:
        log.set_verbosity(verbosity)
        if has_bars:
            log.enable_progress_bar()
