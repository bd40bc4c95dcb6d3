"""Quantization of a base: of dense weights when they are loaded, or of its checkpoint.

On load only the linear layers are quantized, to 4 or 8 bits a weight; embedding, norms and the LM
head stay as they are. Activations are not quantized, so the states of a sample do not depend on
the samples beside it in a batch. That is why int8 is torchao's and not that of bitsandbytes, which
looks for outliers in the whole batch.
"""

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, TorchAoConfig

from carryon.cache.base.quiet import errors_only
from carryon.cache.errors import InputError
from carryon.cache.optional import require

logger = logging.getLogger(__name__)

_EXTRA = "quantize"
_PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
_LONGEST = 60
_DETAILS = ("bnb_4bit_quant_type", "format", "fmt", "bits", "w_bit", "weight_dtype")
"""Entries of a checkpoint's quantization_config that say which type its method has, by priority."""


def quantizer_of(name: str, dtype: torch.dtype) -> Any:  # noqa: ANN401 -- a config of transformers
    """Return the settings of transformers that quantize on load.

    Args:
        name: `nf4`, `int8` or `fp8`.
        dtype: in which products are computed.

    Raises:
        MissingExtraError: the package that does it is not installed.
    """
    package = import_quantizer(_PACKAGES[name], purpose=f"--quantize {name}")
    if name == "nf4":
        make: Any = BitsAndBytesConfig
        return make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    make = TorchAoConfig
    types: Any = package.quantization
    is_int8 = name == "int8"
    return make(types.Int8WeightOnlyConfig() if is_int8 else types.Float8WeightOnlyConfig())


def import_quantizer(package: str, *, purpose: str) -> ModuleType:
    """Import a package that quantizes, without code from elsewhere.

    On some CPUs bitsandbytes fetches compiled code from the hub where the package kernels is
    installed; its own code is slower.

    Raises:
        MissingExtraError: it is not installed.
    """
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]  # its import fails
    try:
        with errors_only(package):
            return require(package, extra=_EXTRA, purpose=purpose)
    finally:
        sys.modules.pop("kernels", None)
        if before is not None:
            sys.modules["kernels"] = before


def quantizer_version(quantization: str | None) -> dict[str, str]:
    """Return name and version of the package that quantizes on load; empty for another base."""
    package = _PACKAGES.get(quantization or "")
    return {package: version(package)} if package else {}


def checkpoint_quantization(config: PreTrainedConfig) -> str | None:
    """Return method and type of a checkpoint that is quantized, such as `gptq-4`; None: dense."""
    facts = getattr(config, "quantization_config", None)
    if facts is None:
        return None
    values: Mapping[str, Any] = facts if isinstance(facts, Mapping) else facts.to_dict()
    words = [str(values.get("quant_method") or "unknown")]
    if values.get("load_in_8bit") or values.get("load_in_4bit"):
        words = ["bitsandbytes"]  # whatever the method says, as transformers takes it
    if values.get("load_in_8bit"):
        words.append("int8")
    else:
        found = (values.get(name) for name in _DETAILS)
        words += [str(each) for each in found if isinstance(each, str | int) and each][:1]
    text = re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower())  # of a file from anyone
    short = text[:_LONGEST].strip("-.") or "unknown"
    return f"{short}-checkpoint" if short in _PACKAGES else short  # no name of one on load


def check_quantized(model: nn.Module, head: nn.Linear, *, quantization: str, name: str) -> None:
    """Check that weights are quantized and the head is not, and log how many.

    Args:
        model: of the base.
        head: its LM head.
        quantization: as a manifest records it.
        name: of the base.

    Raises:
        InputError: the head is quantized, or on load no weight was.
    """
    if not is_dense(head):
        raise InputError(
            f"base {name}: expected a dense LM head, got one that is quantized ({quantization}). "
            "Fix: give a checkpoint that leaves the head as it is"
        )
    linears = [each for each in model.modules() if isinstance(each, nn.Linear) and each is not head]
    count = sum(not is_dense(each) for each in linears)
    if quantization in _PACKAGES and not count:
        raise InputError(
            f"base {name}: expected linear layers to quantize, got none in {type(model).__name__}. "
            "Fix: leave out --quantize"
        )
    shapes = {id(p): p.shape.numel() for m in model.modules() if is_dense(m) for p in _own(m)}
    logger.info(
        f"base {name}: quantized ({quantization}), {count} of {len(linears)} linear layers; "
        f"{sum(shapes.values()) / 1e6:,.1f} M weights are dense"
    )


def is_dense(module: nn.Module) -> bool:
    """Return whether the weights of a module itself are plain tensors of floating point."""
    return all(_is_plain(each) for each in _own(module))


def _own(module: nn.Module) -> Iterator[Tensor]:
    return module.parameters(recurse=False)


def _is_plain(weight: Tensor) -> bool:
    is_wide = weight.is_floating_point() and weight.element_size() > 1
    return is_wide and type(weight) in (nn.Parameter, Tensor) and type(weight.data) is Tensor
