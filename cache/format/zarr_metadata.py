"""Paths of a store's files, shapes of its chunks, and the zarr.json documents of its arrays.

zarr-python makes the array documents when a store is planned. In the canonical JSON form of
`files.json_bytes` they are the same bytes under zarr 3.1.6 and 3.4.2. Reading imports no zarr.
Letters: N rows of the token axis, D base width.
"""

import json
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from carryon.cache.errors import InputError

CHUNK_BYTES = 5 << 20
"""Upper limit of an inner chunk, raw. Smaller chunks compress worse: 0.634 of raw at 4.7 MB,
0.652 at 1.2 MB, 0.694 at 0.3 MB on bfloat16 states of a 135M Llama."""
TABLE_ROWS = 65536
"""Rows in a chunk of the sample tables."""
HEAD_CHUNK_BYTES = 1 << 20
"""Size of a chunk of the head, raw: opening reads a few rows of it, training all."""
ROW_ARRAYS = {"tokens": "int32", "loss_mask": "uint8", "char_end": "int32"}
"""Arrays [N] that planning writes, and their types."""
ALIGNED_ARRAYS = {
    "tokens": "int32",
    "parents": "int32",
    "exact": "int32",
    "stable": "int32",
    "covered": "int32",
    "is_whole": "uint8",
    "num_nodes": "int32",
}
"""Arrays below `aligned/` in a store that is aligned to another; see docs/store-format.md."""
SKIPPED_PATH = "skipped.jsonl"
"""File of the rows that were left out (`--bad-rows skip`), a JSON line each; only if any were."""


def chunk_rows(*, row_bytes: int, unit_tokens: int) -> int:
    """Return the rows of an inner chunk: the largest divisor of the unit within CHUNK_BYTES.

    Raises:
        InputError: `unit_tokens` has no such divisor that is large enough to compress well.
    """
    limit = max(1, CHUNK_BYTES // row_bytes)
    best = max(rows for rows in range(1, min(limit, unit_tokens) + 1) if unit_tokens % rows == 0)
    if best * 8 < min(limit, unit_tokens):
        raise InputError(
            f"unit_tokens: expected a multiple of a number near {limit}, got {unit_tokens}, whose "
            f"chunks would have {best} rows. Fix: --unit-tokens with a power of two"
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
    is_raw: bool = False,
) -> dict[str, Any]:
    """Return the zarr.json of an array: Blosc zstd-1, byte shuffle, one block, then crc32c.

    Args:
        shape: of the whole array.
        chunk: shape of what is compressed at once.
        dtype: a Zarr v3 core type name, such as `uint16`.
        attributes: user attributes, such as `logical_dtype`.
        shard: shape of a file, a multiple of `chunk`. None: each chunk is a file.
        is_raw: whether chunks are not compressed: crc32c alone.
    """
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    item_bytes = np.dtype(dtype).itemsize
    blosc = BloscCodec(
        cname="zstd",
        clevel=1,
        shuffle="shuffle" if item_bytes > 1 else "noshuffle",
        typesize=item_bytes,
        blocksize=prod(chunk) * item_bytes,
    )
    files: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(files),
        shape=shape,
        chunks=chunk,
        shards=shard,
        dtype=dtype,
        compressors=[Crc32cCodec()] if is_raw else [blosc, Crc32cCodec()],
        fill_value=0,
        attributes=attributes,
    )
    document: dict[str, Any] = json.loads(files["zarr.json"].to_bytes())
    return document | {"fill_value": 0}  # as in every store; zarr writes 0.0 for floats


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


def places(path: str) -> list[str]:
    """Return where planning writes a file: at `path`, and at its copy if it is mirrored."""
    return [path, copy_path(path)] if is_mirrored(path) else [path]


def is_mirrored(path: str) -> bool:
    """Tell whether planning writes a file twice: all but what is large and in the base."""
    return not path.startswith(("head/", "blocks/")) or path == "head/zarr.json"
