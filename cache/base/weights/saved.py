"""Weights of a base as its checkpoint holds them, read in pieces from its safetensors.

Loading in a narrower dtype loses bits that the digest of the base covers. They are read from the
files again, some rows at a time, and each piece is compared with the weight that was loaded.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from carryon.cache.base.identity import digest_pieces, join_digests, row_parts, saved_tensors
from carryon.cache.base.source.location import BaseSource
from carryon.cache.base.weights.files import WeightFile
from carryon.cache.base.weights.offloaded import FileWeight, Weight
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
        found: dict[str, WeightFile] = {}
        for path in _files(source):
            file = WeightFile(path)
            found |= dict.fromkeys(file.names(), file)
            file.close()
        return join_digests(
            _digest_saved(names, tensor, found, dtype=dtype)
            for names, tensor in saved_tensors(model).items()
        )
    except _OtherWeights:
        return None


def _digest_saved(
    names: tuple[str, ...], loaded: Weight, files: dict[str, WeightFile], *, dtype: torch.dtype
) -> str:
    name = next((each for each in names if each in files), None)
    if name is None or not loaded.dtype.is_floating_point:
        raise _OtherWeights
    file = files[name]
    if file.shape(name) != tuple(loaded.shape) or not loaded.shape:
        raise _OtherWeights
    digest = digest_pieces(names[0], loaded.shape, dtype, _pieces(file, name, loaded))
    file.close()  # of many files, one is mapped at a time
    return digest


def _pieces(file: WeightFile, name: str, loaded: Weight) -> Iterator[Tensor]:
    """Yield the rows of a saved tensor, each compared with those that were loaded."""
    if isinstance(loaded, FileWeight):
        others = loaded.pieces()
    else:
        others = (loaded[rows] for rows in row_parts(loaded.shape))
    for piece, same in zip(file.pieces(name), others, strict=True):
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
    lines, file = [], WeightFile(path)
    for name in file.names():
        pieces = file.pieces(name)
        first = next(pieces, torch.empty(0))
        lines.append(digest_pieces(name, file.shape(name), first.dtype, chain([first], pieces)))
    return lines


def _files(source: BaseSource) -> list[str]:
    """Return the safetensors of a base that was just loaded; none where it has other files."""
    index, single = (
        cached_file(
            source.name, name, _raise_exceptions_for_missing_entries=False, **source.place()
        )
        for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    )
    if single is not None:  # as transformers, which looks for it first
        return [single]
    if index is None:
        return []
    try:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
        paths = [cached_file(source.name, str(name), **source.place()) for name in names]
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise InputError(f"base {source.name}: {index}: expected an index of weights") from error
    return [str(path) for path in paths]
