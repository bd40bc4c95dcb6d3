"""Weights of a spread base that are not in its modules: in host memory, or in safetensors files.

accelerate keeps them in a map that each module's hook looks its weights up in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn

from carryon.cache.base.weights.files import WeightFile


@dataclass(frozen=True, kw_only=True, slots=True)
class FileWeight:
    """A weight in a safetensors file."""

    path: str
    """Of the file."""
    name: str
    """Of the weight in it."""
    dtype: torch.dtype
    """In which the base computes with it."""
    shape: tuple[int, ...]
    """Of the whole weight."""

    def pieces(self) -> Iterator[Tensor]:
        """Yield its rows in order, in `dtype`; the file is closed afterwards."""
        file = WeightFile(self.path)
        for piece in file.pieces(self.name):
            yield piece.to(self.dtype)


Weight = Tensor | FileWeight


def place_of(weight: Weight) -> tuple[object, ...]:
    """Return what two names of one tied weight have in common, and no other weights."""
    if isinstance(weight, FileWeight):
        return weight.path, weight.name
    return weight.data_ptr(), tuple(weight.shape)


def kept_weight(model: nn.Module, name: str) -> Weight:
    """Return a weight that is not in its module now: a tensor in host memory, or in a file.

    Args:
        model: spread by accelerate.
        name: of the weight in its state_dict.

    Raises:
        KeyError: it is nowhere.
    """
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        hook = getattr(model.get_submodule(".".join(parts[:end])), "_hf_hook", None)
        found = getattr(hook, "weights_map", None)
        if found is not None:
            return _look_up(found, parts[end:])
    raise KeyError(name)


def _look_up(found: Any, parts: Sequence[str]) -> Weight:  # noqa: ANN401 -- maps of accelerate
    key, inner = ".".join(parts), found
    while isinstance(inner, PrefixedDataset):
        key, inner = f"{inner.prefix}{key}", inner.dataset
    if isinstance(inner, OffloadedWeightsLoader) and key not in inner.state_dict:
        facts = inner.index[key]
        path, name = facts.get("safetensors_file"), facts.get("weight_name", key)
        if path is not None:
            dtype: torch.dtype = getattr(torch, facts["dtype"])
            shape = WeightFile(path).shape(name)
            return FileWeight(path=path, name=name, dtype=dtype, shape=shape)
    weight: Tensor = inner[key]
    return weight
