"""Weights of a base as its checkpoint holds them, read in pieces from its safetensors.

Loading in a narrower dtype loses bits that the digest of the base covers. They are read from the
files again, a few megabytes at a time, and each piece is compared with the weight that was loaded.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from carryon.cache.base.identity import digest_pieces, join_digests, row_parts, saved_tensors
from carryon.cache.base.loading import BaseSource
from carryon.cache.base.offloaded import Weight
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
    names: tuple[str, ...], loaded: Weight, files: dict[str, Any], *, dtype: torch.dtype
) -> str:
    name = next((each for each in names if each in files), None)
    if name is None or not loaded.dtype.is_floating_point:
        raise _OtherWeights
    saved = files[name].get_slice(name)
    if tuple(saved.get_shape()) != tuple(loaded.shape) or not loaded.shape:
        raise _OtherWeights
    return digest_pieces(names[0], loaded.shape, dtype, _pieces(saved, loaded))


def _pieces(saved: Any, loaded: Weight) -> Iterator[Tensor]:  # noqa: ANN401 -- of safetensors
    """Yield the rows of a saved tensor, each compared with those that were loaded."""
    for rows in row_parts(loaded.shape):
        piece: Tensor = saved[rows]
        same = loaded[rows]
        if not torch.equal(piece.to(same.device, same.dtype), same):
            raise _OtherWeights
        yield piece


def digest_files(source: BaseSource, *, quantization: str) -> str:
    """Return the identity of the weights of a quantized base: of its files, and how they are used.

    Every tensor counts as it is saved, by name, shape, dtype and bytes, however it is divided into
    files. Dense weights that are quantized on load have another digest than without.

    Args:
        source: of the base.
        quantization: as a manifest records it.

    Raises:
        InputError: its files are no safetensors.
    """
    paths = _files(source)
    if not paths:
        raise InputError(
            f"base {source.name}: expected a quantized base in safetensors, got other files. Fix: "
            "save it as safetensors"
        )
    with ThreadPoolExecutor() as pool:
        lines = sorted(line for some in pool.map(_digest_file, paths) for line in some)
    return join_digests([*lines, f"quantization {quantization}"])


def _digest_file(path: str) -> list[str]:
    """Return the line of each tensor in a file."""
    lines = []
    with safe_open(path, framework="pt", device="cpu", backend="pread") as file:
        for name in file.keys():  # noqa: SIM118 -- it is no mapping
            saved = file.get_slice(name)
            shape = saved.get_shape()
            if not shape:
                pieces = iter([file.get_tensor(name)])
            else:
                pieces = (saved[rows] for rows in row_parts(shape))
            first = next(pieces, torch.empty(0))
            lines.append(digest_pieces(name, shape, first.dtype, chain([first], pieces)))
    return lines


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
