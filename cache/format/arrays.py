"""Small and middle-sized arrays of a store: sample tables, head, probe, tokens.

Plain Zarr arrays, chunked along the first axis, one file a chunk. Sharded arrays (the hidden
states) are written and read by unit_writer.py and unit_reader.py.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import DamagedStoreError
from carryon.cache.files import json_bytes
from carryon.cache.format.codec import decode_chunk, encode_chunk
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
        first_row: rows before it stand already; chunks that end before it are left out.
        attributes: user attributes of the array.
    """
    chunk = (rows_per_chunk, *values.shape[1:])
    for number in range(first_row // rows_per_chunk, -(-len(values) // rows_per_chunk)):
        rows = np.zeros(chunk, dtype=values.dtype)
        part = values[number * rows_per_chunk : (number + 1) * rows_per_chunk]
        rows[: len(part)] = part
        yield _chunk_path(name, number, values.ndim), encode_chunk(rows)
    document = array_document(
        shape=values.shape, chunk=chunk, dtype=values.dtype.name, attributes=attributes
    )
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
        raise DamagedStoreError(f"{path}: missing or damaged: run carryon verify") from error


Digests = Mapping[str, Collection[str]]
"""SHA-256, hex, that each file of a plan may have: `files` of the manifest."""


def read_array(
    root: Path, name: str, *, digests: Digests, first: int = 0, stop: int | None = None
) -> NDArray[Any]:
    """Return rows `first` to `stop` (default: all) of the array `name`.

    Raises:
        DamagedStoreError: a chunk is missing or is not the one that was written; names it.
    """
    info = array_info(root, name)
    rows, rows_per_chunk = info.shape[0], info.chunk[0]
    stop = rows if stop is None else stop
    out = np.empty((stop - first, *info.shape[1:]), dtype=info.dtype)
    for number in range(first // rows_per_chunk, -(-stop // rows_per_chunk)):
        path = _chunk_path(name, number, len(info.shape))
        chunk = read_chunk(root, path, info, sha256=digests.get(path, ()))
        chunk_first = number * rows_per_chunk
        low, high = max(first, chunk_first), min(stop, chunk_first + rows_per_chunk)
        out[low - first : high - first] = chunk[low - chunk_first : high - chunk_first]
    return out


def read_rows(
    root: Path, name: str, rows: NDArray[np.integer[Any]], *, digests: Digests
) -> NDArray[Any]:
    """Return chosen rows [n] of the array `name`, decoding only the chunks they lie in."""
    info = array_info(root, name)
    out = np.empty((len(rows), *info.shape[1:]), dtype=info.dtype)
    numbers = rows // info.chunk[0]
    for number in np.unique(numbers).tolist():
        path = _chunk_path(name, number, len(info.shape))
        chunk = read_chunk(root, path, info, sha256=digests.get(path, ()))
        here = np.flatnonzero(numbers == number)
        out[here] = chunk[rows[here] - number * info.chunk[0]]
    return out


def read_chunk(
    root: Path, path: str, info: ArrayInfo, *, sha256: Collection[str] | None
) -> NDArray[Any]:
    """Return one whole chunk file of an array.

    Args:
        root: of the store.
        path: of the file.
        info: of the array.
        sha256: digests, hex, one of which the file must have, so that a sound file from elsewhere
            is not taken for it. None: nothing says which it should have; its checksum must do.

    Raises:
        DamagedStoreError: the file is missing or is not the one that was written.
    """
    try:
        stored = (root / path).read_bytes()
    except FileNotFoundError as error:
        raise DamagedStoreError(
            f"{root / path}: missing: run carryon verify, then repair"
        ) from error
    out = np.empty(info.chunk, dtype=info.dtype)
    decode_chunk(memoryview(stored), out, name=str(root / path))
    if sha256 is not None and hashlib.sha256(stored).hexdigest() not in sha256:
        raise DamagedStoreError(
            f"{root / path}: sound, but not the file that was written there: "
            "run carryon verify, then repair"
        )
    return out


def _chunk_path(name: str, number: int, num_axes: int) -> str:
    return f"{name}/c/{number}" + "/0" * (num_axes - 1)
