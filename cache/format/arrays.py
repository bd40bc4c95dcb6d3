"""Read and encode the plain arrays of a store: sample tables, head, probe, tokens.

They are chunked along the first axis, one file a chunk. The sharded arrays, the hidden states, are
in shard_writer.py and shard_reader.py.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import DamagedStoreError
from carryon.cache.files import json_bytes
from carryon.cache.format.codec import decode_chunk, encode_chunk
from carryon.cache.format.manifest import sha256_hex
from carryon.cache.format.zarr_metadata import array_document


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


def array_info(root: Path, name: str) -> ArrayInfo:
    """Read the zarr.json of a plain array of the store."""
    path = root / name / "zarr.json"
    try:
        document = json.loads(path.read_bytes())
        return ArrayInfo(
            shape=tuple(document["shape"]),
            chunk=tuple(document["chunk_grid"]["configuration"]["chunk_shape"]),
            dtype=np.dtype(document["data_type"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedStoreError(f"{path}: missing or damaged") from error


Digests = Mapping[str, Collection[str]]
"""SHA-256, hex, that each file of a plan may have: `files` of the manifest."""


def read_file(root: Path, path: str, *, digests: Digests) -> bytes:
    """Return a file of the plan that is no array.

    Raises:
        DamagedStoreError: it is missing or is not the one that was written.
    """
    try:
        content = (root / path).read_bytes()
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{root / path}: the file is missing") from error
    if sha256_hex(content) not in digests.get(path, ()):
        raise DamagedStoreError(f"{root / path}: not as it was written: its SHA-256 differs")
    return content


def read_array(
    root: Path, name: str, *, digests: Digests, first: int = 0, stop: int | None = None
) -> NDArray[Any]:
    """Return rows `first` to `stop` (default: all) of the array `name`.

    Raises:
        DamagedStoreError: a chunk is missing or is not the one that was written; names it.
    """
    info = array_info(root, name)
    size = info.chunk[0]
    stop = info.shape[0] if stop is None else stop
    out = np.empty((stop - first, *info.shape[1:]), dtype=info.dtype)
    for number in range(first // size, -(-stop // size)):
        chunk = _read_numbered(root, name, info, number, digests)
        low, high = max(first, number * size), min(stop, (number + 1) * size)
        out[low - first : high - first] = chunk[low - number * size : high - number * size]
    return out


def read_rows(
    root: Path, name: str, rows: NDArray[np.integer[Any]], *, digests: Digests
) -> NDArray[Any]:
    """Return chosen rows [n] of the array `name`, decoding only the chunks they lie in."""
    info = array_info(root, name)
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
    try:
        stored = (root / path).read_bytes()
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


def _chunk_path(name: str, number: int, num_axes: int) -> str:
    return f"{name}/c/{number}" + "/0" * (num_axes - 1)
