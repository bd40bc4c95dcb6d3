"""Headers of safetensors files, checked before anything of the size that they tell is allocated.

A file is eight bytes (length of the header, little-endian), the header (JSON: dtype, shape and
bytes from-to of each tensor), and the tensors' bytes. Sizes are compared with each other and with
the file's own, so a file that is cut off is found from its header.
Source of the format: https://github.com/huggingface/safetensors, README.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import InputError
from carryon.cache.files.documents import parse_json

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
"""Bytes of a value of each dtype that is read here."""
MAX_HEADER_BYTES = 1 << 20
"""Of files with a handful of tensors; safetensors itself allows 100 MB."""
FIRST_BYTES = 1 << 14
"""Read at once from the start of a file: the header and, before larger tensors, the token ids."""
_LENGTH_BYTES = 8
_MAX_AXES = 4
_METADATA = "__metadata__"


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlace:
    """A tensor of a file."""

    dtype: str
    """As safetensors writes it: a key of ITEM_BYTES."""
    shape: tuple[int, ...]
    first: int
    """Of its bytes, counted from the start of the file."""
    stop: int
    """Behind its bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What the start of a file says."""

    content: bytes
    """The length and the header, as they are in the file."""
    tensors: Mapping[str, TensorPlace]
    metadata: Mapping[str, str]


def read_header(handle: int, *, name: str) -> tuple[Header, bytes]:
    """Read and check the header of an open file.

    Args:
        handle: of the file.
        name: of the file, for errors.

    Returns:
        The header, and the first bytes of the file, at least all of the header.

    Raises:
        InputError: the file is cut off or longer than its header tells, or the header is damaged;
            nothing larger than MAX_HEADER_BYTES was read.
    """
    size = os.fstat(handle).st_size
    start = os.pread(handle, FIRST_BYTES, 0)
    length = int.from_bytes(start[:_LENGTH_BYTES], "little")
    end = _LENGTH_BYTES + length
    if len(start) < _LENGTH_BYTES or end > size:
        raise _damaged(name, f"{size:,} bytes, fewer than its header has: the file is cut off")
    if length > MAX_HEADER_BYTES:
        raise _damaged(name, f"a header of {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
    if len(start) < end:
        start = os.pread(handle, end, 0)
    try:
        tensors, metadata = _parse(start[_LENGTH_BYTES:end], first=end)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(name, f"a damaged header ({str(error)!a:.120})") from error
    told = max((place.stop for place in tensors.values()), default=end)
    if told != size:
        problem = "the file is cut off" if size < told else "bytes that no tensor has"
        raise _damaged(name, f"{size:,} bytes where its header tells {told:,}: {problem}")
    return Header(content=start[:end], tensors=tensors, metadata=metadata), start


def _damaged(name: str, got: str) -> InputError:
    return InputError(
        f"{name}: expected a whole safetensors file, got {got}. Fix: write this file again"
    )


def _parse(content: bytes, *, first: int) -> tuple[dict[str, TensorPlace], dict[str, str]]:
    """Return the tensors and the metadata of a header; tensors lie one after another.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is damaged.
    """
    document: dict[str, Any] = parse_json(content)
    metadata = document.pop(_METADATA, {})
    if not all(isinstance(text, str) for text in metadata.values()):
        raise TypeError("metadata: expected texts")
    tensors = {}
    for name, entry in document.items():
        dtype, shape = entry["dtype"], entry["shape"]
        begin, end = entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise ValueError(f"dtype: expected one of {' '.join(ITEM_BYTES)}, got {dtype}")
        sizes = [*shape, begin, end]
        if not all(type(number) is int and 0 <= number < 1 << 48 for number in sizes):
            raise ValueError("expected whole numbers as sizes")
        if len(shape) > _MAX_AXES or prod(shape) * ITEM_BYTES[dtype] != end - begin:
            raise ValueError(f"{name}: shape {shape} does not fill {end - begin} bytes")
        tensors[name] = TensorPlace(
            dtype=dtype, shape=tuple(shape), first=first + begin, stop=first + end
        )
    place = first
    for tensor in sorted(tensors.values(), key=lambda each: (each.first, each.stop)):
        if tensor.first != place:
            raise ValueError("expected tensors one behind the other, got overlaps or gaps")
        place = tensor.stop
    return tensors, metadata


def encode_file(
    tensors: Mapping[str, tuple[str, NDArray[Any]]], metadata: Mapping[str, str]
) -> bytes:
    """Return the bytes of a safetensors file.

    Args:
        tensors: dtype and values by name, in the order of their bytes: those with larger values
            first, so that all are aligned.
        metadata: texts.
    """
    document: dict[str, Any] = {_METADATA: dict(metadata)}
    place = 0
    for name, (dtype, values) in tensors.items():
        offsets = [place, place + values.nbytes]
        document[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        place += values.nbytes
    header = json.dumps(document).encode("ascii")
    header += b" " * (-len(header) % _LENGTH_BYTES)
    contents = [np.ascontiguousarray(values).tobytes() for _, values in tensors.values()]
    return b"".join([len(header).to_bytes(_LENGTH_BYTES, "little"), header, *contents])
