"""Weights of a base as its checkpoint holds them, read in pieces from its safetensors.

Loading in a narrower dtype loses bits that the digest of the base covers. They are read from the
files again, a few megabytes at a time, and each piece is compared with the weight that was loaded.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from carryon.cache.base.identity import PIECE_ITEMS, digest_pieces, join_digests, saved_tensors
from carryon.cache.base.loading import BaseSource
from carryon.cache.errors import InputError


class _OtherWeights(Exception):
    """A file does not hold a weight as the model has it."""


def digest_checkpoint(model: nn.Module, source: BaseSource, *, dtype: torch.dtype) -> str | None:
    """Return the digest that `digest_weights` has for the same base loaded in `dtype`.

    None: its files are not safetensors, or do not hold the model's tensors one by one, such as
    those of a mixture of experts, whose matrices transformers joins.

    Args:
        model: loaded in any dtype from `source`.
        source: of the base.
        dtype: of the checkpoint.
    """
    try:
        with ExitStack() as stack:
            found: dict[str, Any] = {}
            for path in _files(source):
                # Not mapped: what was read once is not counted as memory of this process.
                file: Any = stack.enter_context(
                    safe_open(path, framework="pt", device="cpu", backend="pread")
                )
                found |= dict.fromkeys(file.keys(), file)
            return join_digests(
                _digest_saved(names, tensor, found, dtype=dtype)
                for names, tensor in saved_tensors(model).items()
            )
    except _OtherWeights:
        return None


def _digest_saved(
    names: tuple[str, ...], loaded: Tensor, files: dict[str, Any], *, dtype: torch.dtype
) -> str:
    name = next((each for each in names if each in files), None)
    if name is None or not loaded.is_floating_point():
        raise _OtherWeights
    saved = files[name].get_slice(name)
    if tuple(saved.get_shape()) != tuple(loaded.shape) or not loaded.dim():
        raise _OtherWeights
    return digest_pieces(names[0], loaded.shape, dtype, _pieces(saved, loaded))


def _pieces(saved: Any, loaded: Tensor) -> Iterator[Tensor]:  # noqa: ANN401 -- of safetensors
    """Yield the rows of a saved tensor, each compared with those that were loaded."""
    rows = max(1, PIECE_ITEMS * loaded.shape[0] // max(1, loaded.numel()))
    for first in range(0, loaded.shape[0], rows):
        stop = min(first + rows, loaded.shape[0])  # of which safetensors takes none beyond
        piece: Tensor = saved[first:stop]
        same = loaded[first:stop]
        if not torch.equal(piece.to(same.device, same.dtype), same):
            raise _OtherWeights
        yield piece


def _files(source: BaseSource) -> list[str]:
    """Return the safetensors of a base that was just loaded; none where it has other files."""
    index, single = (
        cached_file(
            source.name, name, _raise_exceptions_for_missing_entries=False, **_place(source)
        )
        for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    )
    if single is not None:  # as transformers, which looks for it first
        return [single]
    if index is None:
        return []
    try:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        paths = [cached_file(source.name, str(name), **_place(source)) for name in names]
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise InputError(f"base {source.name}: {index}: expected an index of weights") from error
    return [str(path) for path in paths]


def _place(source: BaseSource) -> dict[str, Any]:
    return {"revision": source.revision} if source.revision is not None else {}
