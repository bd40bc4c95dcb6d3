"""Read and encode the plain arrays of a store: sample tables, head, probe, tokens.

They are chunked along the first axis, one file a chunk. The sharded arrays, the hidden states, are
in shard_writer.py and shard_reader.py.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import DamagedStoreError
from carryon.cache.files.documents import json_bytes, parse_json
from carryon.cache.files.regular import read_below
from carryon.cache.format.codec import decode_chunk, encode_chunk
from carryon.cache.format.manifest import Manifest, sha256_hex
from carryon.cache.format.schema import (
    FRAME_BYTES,
    MAX_CHUNK_BYTES,
    MAX_DOCUMENT_BYTES,
    max_planned_bytes,
)
from carryon.cache.format.zarr_metadata import ALIGNED_ARRAYS, ROW_ARRAYS, array_document


@dataclass(frozen=True, kw_only=True, slots=True)
class ArrayInfo:
    """What the zarr.json of a plain array says."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype[Any]


def encode_array(
    name: str,
    values: NDArray[Any],
    *,
    rows_per_chunk: int,
    first_row: int = 0,
    attributes: dict[str, Any] | None = None,
) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of each file of the array `name`: chunks first, zarr.json last.

    Args:
        name: path of the array in the store.
        values: all rows of the array; the last chunk is filled up with zeros.
        rows_per_chunk: rows in a file.
        first_row: first row that is new; chunks that end before it are left out.
        attributes: user attributes of the array.
    """
    first_chunk = first_row // rows_per_chunk
    starts = range(first_chunk * rows_per_chunk, len(values), rows_per_chunk)
    yield from encode_chunks(
        name,
        (values[start : start + rows_per_chunk] for start in starts),
        shape=values.shape,
        dtype=values.dtype,
        rows_per_chunk=rows_per_chunk,
        first_chunk=first_chunk,
        attributes=attributes,
    )


def encode_chunks(
    name: str,
    chunks: Iterable[NDArray[Any]],
    *,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    rows_per_chunk: int,
    first_chunk: int = 0,
    attributes: dict[str, Any] | None = None,
) -> Iterator[tuple[str, bytes]]:
    """Yield what `encode_array` does, from the rows of one chunk after another.

    Args:
        name: path of the array in the store.
        chunks: rows of each chunk, from `first_chunk` on; fewer in the last one.
        shape: of the whole array.
        dtype: of the array.
        rows_per_chunk: rows in a file.
        first_chunk: number of the first of `chunks`.
        attributes: user attributes of the array.
    """
    chunk = (rows_per_chunk, *shape[1:])
    for number, part in enumerate(chunks, start=first_chunk):
        rows = np.zeros(chunk, dtype=dtype)
        rows[: len(part)] = part
        yield _chunk_path(name, number, len(shape)), encode_chunk(rows)
    document = array_document(shape=shape, chunk=chunk, dtype=dtype.name, attributes=attributes)
    yield f"{name}/zarr.json", json_bytes(document)


def unit_array_info(manifest: Manifest, name: str) -> ArrayInfo:
    """Return what the zarr.json of an array with one chunk a unit has to say: tokens, masks,
    character ends, and the scales of a lossy profile."""
    num_units, rows = manifest.num_units, manifest.unit_tokens
    if name.startswith("scale/channel/"):
        shape, chunk = (num_units, manifest.width), (1, manifest.width)
        return ArrayInfo(shape=shape, chunk=chunk, dtype=np.dtype(np.float32))
    dtype = np.dtype(ROW_ARRAYS.get(name, "float32"))
    return ArrayInfo(shape=(num_units * rows,), chunk=(rows,), dtype=dtype)


def check_unit_document(content: bytes, manifest: Manifest, name: str) -> None:
    """Check the zarr.json of an array over units, which other Zarr readers believe.

    Args:
        content: of the document.
        manifest: of the store.
        name: `hidden/<tap>`, or of an array that `unit_array_info` knows.

    Raises:
        ValueError, KeyError, TypeError, IndexError: it disagrees with the manifest.
    """
    document = parse_json(content)
    rows, width = manifest.unit_tokens, manifest.width
    if name.startswith("hidden/"):
        chunk: tuple[int, ...] = (rows, width)
        dtype = manifest.states_dtype
        inner = document["codecs"][0]["configuration"]["chunk_shape"]
        if inner != [manifest.rows_per_chunk, width]:
            raise ValueError(f"expected inner chunks of {manifest.rows_per_chunk} rows")
    else:
        info = unit_array_info(manifest, name)
        chunk, dtype = info.chunk, info.dtype
    found = document["chunk_grid"]["configuration"]["chunk_shape"]
    shape = document["shape"]
    if found != list(chunk) or len(shape) != len(chunk) or shape[1:] != list(chunk[1:]):
        raise ValueError(f"expected chunks of shape {chunk}")
    if document["data_type"] != dtype.name:
        raise ValueError(f"expected data type {dtype.name}")


Digests = Mapping[str, Collection[str]]
"""SHA-256, hex, that each file of a plan may have: `files` of the manifest."""

TABLE_TYPES = {
    "units": ("int32",),
    "samples/start": ("int64",),
    "samples/length": ("int32",),
    "samples/id": ("uint8",),
    "samples/held_out": ("uint8",),
    "samples/group": ("uint64",),
    "samples/role": ("uint8",),
    "head/lm_head": ("uint16", "float16", "float32"),
    "head/norm_weight": ("float32",),
    "head/norm_bias": ("float32",),
    "head/bias": ("float32",),
    "probe/rows": ("int64",),
    "probe/top_ids": ("int32",),
    "probe/top_logits": ("float32",),
    "probe/states": ("float32",),
    **{f"aligned/{name}": (kind,) for name, kind in ALIGNED_ARRAYS.items()},
}
"""Types that each array of a plan can have; `probe/states` stands for that of each tap."""


def array_info(root: Path, name: str, *, digests: Digests) -> ArrayInfo:
    """Read the zarr.json of an array that planning wrote.

    Raises:
        DamagedStoreError: it is missing or is not the one that was written, or what it says is
            beyond what such an array can be.
    """
    path = f"{name}/zarr.json"
    try:
        content = read_below(root, path, max_bytes=MAX_DOCUMENT_BYTES)
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{root / path}: missing or damaged") from error
    if sha256_hex(content) not in digests.get(path, ()):
        raise DamagedStoreError(f"{root / path}: not as it was written: its SHA-256 differs")
    key = "probe/states" if name.startswith("probe/states/") else name
    try:
        document = parse_json(content)
        shape = tuple(document["shape"])
        chunk = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
        kind = document["data_type"]
        if kind not in TABLE_TYPES[key]:
            raise ValueError(f"expected {' or '.join(TABLE_TYPES[key])}, got {kind!a:.40}")
        if not all(type(size) is int and 0 <= size < 1 << 48 for size in (*shape, *chunk)):
            raise ValueError("expected whole numbers as sizes")
        if len(shape) not in (1, 2) or shape[1:] != chunk[1:] or min(chunk) < 1:
            raise ValueError("expected chunks along the first of one or two axes")
        info = ArrayInfo(shape=shape, chunk=chunk, dtype=np.dtype(kind))
        if (num_bytes := prod(chunk) * info.dtype.itemsize) > MAX_CHUNK_BYTES:
            raise ValueError(f"expected chunks up to {MAX_CHUNK_BYTES} bytes, got {num_bytes}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{root / path}: missing or damaged: {error}") from error
    return info


def read_file(root: Path, path: str, *, digests: Digests) -> bytes:
    """Return a file of the plan that is no array.

    Raises:
        DamagedStoreError: it is missing or is not the one that was written.
    """
    try:
        content = read_below(root, path, max_bytes=max_planned_bytes(path))
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{root / path}: the file is missing") from error
    if sha256_hex(content) not in digests.get(path, ()):
        raise DamagedStoreError(f"{root / path}: not as it was written: its SHA-256 differs")
    return content


def read_array(
    root: Path,
    name: str,
    *,
    digests: Digests,
    first: int = 0,
    stop: int | None = None,
    info: ArrayInfo | None = None,
) -> NDArray[Any]:
    """Return rows `first` to `stop` (default: all) of the array `name`.

    `info` is that of `array_info`, if it is known.

    Raises:
        DamagedStoreError: a chunk is missing or is not the one that was written; names it.
    """
    info = info or array_info(root, name, digests=digests)
    size = info.chunk[0]
    stop = info.shape[0] if stop is None else stop
    if not 0 <= first <= stop <= info.shape[0]:
        raise DamagedStoreError(
            f"{root / name}: expected rows {first} to {stop}, got an array of {info.shape[0]}"
        )
    for number in range(first // size, -(-stop // size)):  # before memory is taken for all rows
        if (path := _chunk_path(name, number, len(info.shape))) not in digests:
            raise DamagedStoreError(f"{root / path}: the manifest does not name this file")
    out = np.empty((stop - first, *info.shape[1:]), dtype=info.dtype)
    for number in range(first // size, -(-stop // size)):
        chunk = _read_numbered(root, name, info, number, digests)
        low, high = max(first, number * size), min(stop, (number + 1) * size)
        out[low - first : high - first] = chunk[low - number * size : high - number * size]
    return out


def read_rows(
    root: Path,
    name: str,
    rows: NDArray[np.integer[Any]],
    *,
    digests: Digests,
    info: ArrayInfo | None = None,
) -> NDArray[Any]:
    """Return chosen rows [n] of the array `name`, decoding only the chunks they lie in."""
    info = info or array_info(root, name, digests=digests)
    if len(rows) and not 0 <= rows.min() <= rows.max() < info.shape[0]:
        raise DamagedStoreError(
            f"{root / name}: expected rows {rows.min()} to {rows.max()}, got an array of "
            f"{info.shape[0]}"
        )
    out = np.empty((len(rows), *info.shape[1:]), dtype=info.dtype)
    numbers = rows // info.chunk[0]
    for number in np.unique(numbers).tolist():
        inside = np.flatnonzero(numbers == number)
        chunk = _read_numbered(root, name, info, number, digests)
        out[inside] = chunk[rows[inside] - number * info.chunk[0]]
    return out


def _read_numbered(
    root: Path, name: str, info: ArrayInfo, number: int, digests: Digests
) -> NDArray[Any]:
    path = _chunk_path(name, number, len(info.shape))
    return read_chunk(root, path, info, sha256=digests.get(path, ()))


def read_chunk(
    root: Path, path: str, info: ArrayInfo, *, sha256: Collection[str] | None
) -> NDArray[Any]:
    """Return one whole chunk file of an array.

    Args:
        root: of the store.
        path: of the file.
        info: of the array.
        sha256: digests, hex, one of which the file must have: a valid file from elsewhere is
            refused. None: only the chunk's own checksum is compared.

    Raises:
        DamagedStoreError: the file is missing or is not the one that was written.
    """
    raw_bytes = prod(info.chunk) * info.dtype.itemsize
    try:
        stored = read_below(root, path, max_bytes=raw_bytes + FRAME_BYTES)
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{root / path}: the file is missing") from error
    out = np.empty(info.chunk, dtype=info.dtype)
    decode_chunk(memoryview(stored), out, name=str(root / path))
    if sha256 is not None and sha256_hex(stored) not in sha256:
        raise DamagedStoreError(
            f"{root / path}: the checksum is valid but the SHA-256 differs from the one that was "
            "recorded: the file was replaced"
        )
    return out


def check_tokens(tokens: NDArray[np.int32], manifest: Manifest, *, name: str) -> None:
    """Check that token ids are rows of the head: numpy would let negative ones wrap round.

    Raises:
        DamagedStoreError: one is not; `name` says of which file.
    """
    least, most = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    size = manifest.alignment.get("anchor_vocab_size", manifest.head["vocab_size"])
    if least < 0 or most >= size:
        raise DamagedStoreError(
            f"{name}: expected token ids from 0 to {size - 1}, got {least if least < 0 else most}",
            fix="extract into another folder",
        )


def _chunk_path(name: str, number: int, num_axes: int) -> str:
    return f"{name}/c/{number}" + "/0" * (num_axes - 1)
