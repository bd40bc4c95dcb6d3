"""Names, shapes and zarr.json documents of a store: pure arithmetic, nothing is read or written.

The documents are written out here instead of by zarr-python, so that the same store has the same
bytes whichever zarr version is installed. Letters: N rows of the token axis, D base width,
S samples, R rows of a unit.
"""

from collections.abc import Sequence
from typing import Any

from carryon.cache.errors import InputError

CHUNK_BYTES = 5 << 20
"""Upper limit of an inner chunk, raw. Smaller chunks compress worse: 0.634 of raw at 4.7 MB,
0.652 at 1.2 MB, 0.694 at 0.3 MB on bfloat16 states of a 135M Llama."""
TABLE_ROWS = 65536
"""Rows in a chunk of the sample tables."""
HEAD_CHUNK_BYTES = 1 << 20
"""Size of a chunk of the head, raw: opening reads a few rows of it, training all."""


def chunk_rows(*, row_bytes: int, unit_tokens: int) -> int:
    """Return the rows of an inner chunk: the largest divisor of the unit within CHUNK_BYTES.

    Raises:
        InputError: `unit_tokens` has no fitting divisor, so chunks would be tiny.
    """
    limit = max(1, CHUNK_BYTES // row_bytes)
    best = max(rows for rows in range(1, min(limit, unit_tokens) + 1) if unit_tokens % rows == 0)
    if best * 8 < min(limit, unit_tokens):
        raise InputError(
            f"unit_tokens: {unit_tokens} can only be cut into chunks of {best} rows, "
            f"expected a multiple of a number near {limit}: take a power of two"
        )
    return best


def group_document(attributes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the zarr.json of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def array_document(
    *,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    dtype: str,
    attributes: dict[str, Any] | None = None,
    shard: tuple[int, ...] | None = None,
) -> dict[str, Any]:
    """Return the zarr.json of an array: Blosc zstd-1, byte shuffle, one block, then crc32c.

    Args:
        shape: of the whole array.
        chunk: of the piece that is compressed as one.
        dtype: a Zarr v3 core type name, such as `uint16`.
        attributes: user attributes, such as `logical_dtype`.
        shard: of the piece that is one file, a multiple of `chunk`; None: a chunk is a file.
    """
    inner = _chunk_codecs(chunk=chunk, dtype=dtype)
    codecs: list[dict[str, Any]] = inner
    if shard is not None:
        sharding = {
            "chunk_shape": list(chunk),
            "codecs": inner,
            "index_codecs": [_bytes_codec("uint64"), {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    grid = list(shard if shard is not None else chunk)
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": codecs,
        "attributes": attributes or {},
        "storage_transformers": [],
    }


def shard_path(tap: str, unit: int) -> str:
    """Return the file of a unit's states at a tap, relative to the store."""
    return f"hidden/{tap}/c/{unit}/0"


def token_scale_path(tap: str, unit: int) -> str:
    """Return the file of a unit's per-token scales (lossy profiles)."""
    return f"scale/token/{tap}/c/{unit}"


def channel_scale_path(tap: str, unit: int) -> str:
    """Return the file of a unit's per-channel scales (lossy profiles)."""
    return f"scale/channel/{tap}/c/{unit}/0"


def state_paths(taps: Sequence[str], unit: int, *, is_lossy: bool) -> list[str]:
    """Return the files that computing a unit writes, without its receipt."""
    paths = [shard_path(tap, unit) for tap in taps]
    if is_lossy:
        paths += [token_scale_path(tap, unit) for tap in taps]
        paths += [channel_scale_path(tap, unit) for tap in taps]
    return paths


def row_path(name: str, unit: int) -> str:
    """Return the file of a unit's `tokens`, `loss_mask` or `char_end`."""
    return f"{name}/c/{unit}"


def receipt_path(unit: int) -> str:
    """Return the file of a unit's receipt."""
    return f"units/{unit}.json"


def copy_path(path: str) -> str:
    """Return where the copy of a file that planning wrote lies; see `is_mirrored`."""
    return f"units/copy/{path}"


def is_mirrored(path: str) -> bool:
    """Tell whether planning writes a file twice: all but what is large and in the base."""
    return not path.startswith(("head/", "blocks/")) or path == "head/zarr.json"


ROW_ARRAYS = {"tokens": "int32", "loss_mask": "uint8", "char_end": "int32"}
"""Arrays over the token axis that planning writes, and their types."""


def _chunk_codecs(*, chunk: tuple[int, ...], dtype: str) -> list[dict[str, Any]]:
    item_bytes = ITEM_BYTES[dtype]
    block_bytes = item_bytes
    for size in chunk:
        block_bytes *= size
    blosc = {
        "cname": "zstd",
        "clevel": 1,
        "shuffle": "shuffle" if item_bytes > 1 else "noshuffle",
        "typesize": item_bytes,
        "blocksize": block_bytes,
    }
    return [
        _bytes_codec(dtype),
        {"name": "blosc", "configuration": blosc},
        {"name": "crc32c"},
    ]


def _bytes_codec(dtype: str) -> dict[str, Any]:
    if ITEM_BYTES[dtype] == 1:
        return {"name": "bytes"}
    return {"name": "bytes", "configuration": {"endian": "little"}}


ITEM_BYTES = {
    "uint8": 1,
    "uint16": 2,
    "float16": 2,
    "int32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
}
"""Bytes of one item of each type the store uses."""
