"""Sizes of what a store holds, and of units before they are written.

Letters: R rows, D base width.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.format.codec import CRC_BYTES, encode_chunk, encode_shard, index_bytes
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.quantization import STEPS, bfloat16_bits, to_codes
from carryon.cache.format.receipt import FileEntry, Receipt, receipt_document
from carryon.cache.format.zarr_metadata import ROW_ARRAYS, row_path, shard_path, state_paths
from carryon.cache.lock import LOCK_PATH
from carryon.cache.versions import library_versions


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitSizes:
    """Stored bytes of hidden states at all taps."""

    token_bytes: float
    """Of a token."""
    empty_chunk_bytes: int
    """Of a chunk without tokens."""
    unit_bytes: int
    """Of a unit in any case: indices and the scales of channels."""

    @classmethod
    def measure(
        cls, manifest: Manifest, states: dict[str, NDArray[Any]], *, profile: str = ""
    ) -> "UnitSizes":
        """Encode some states [R, D], by tap, as in the store.

        Args:
            manifest: of the store.
            states: float32, or bits of bfloat16 for an exact profile; in the order of the store,
                as texts that begin alike make a chunk smaller.
            profile: other than that of the manifest.
        """
        profile = profile or manifest.settings["profile"]
        num_chunks = manifest.unit_tokens // manifest.rows_per_chunk
        if profile == "raw":  # of one size, whatever is in it; the last chunk is stored whole
            row_bytes = manifest.width * manifest.states_dtype.itemsize
            chunk_bytes = manifest.rows_per_chunk * row_bytes + CRC_BYTES
            shard_bytes = num_chunks * chunk_bytes + index_bytes(num_chunks)
            return cls(token_bytes=0, empty_chunk_bytes=0, unit_bytes=len(states) * shard_bytes)
        num_rows = len(next(iter(states.values())))
        per_chunk = manifest.rows_per_chunk
        left = num_rows % per_chunk
        if num_rows > per_chunk and left < per_chunk // 2:  # a chunk of few rows is not typical
            num_rows -= left
        padding = -num_rows % per_chunk
        stored, empty, fixed = 0, 0, 0
        for rows in states.values():
            padded = np.pad(rows[:num_rows], ((0, padding), (0, 0)))  # as the end of a unit
            values, scales, channels = _stored_form(manifest, profile, padded)
            shard = encode_shard(values, rows_per_chunk=per_chunk)
            stored += len(shard) - index_bytes(len(padded) // per_chunk) + scales
            empty += len(encode_chunk(np.zeros((per_chunk, manifest.width), values.dtype)))
            fixed += index_bytes(num_chunks) + channels
        return cls(token_bytes=stored / num_rows, empty_chunk_bytes=empty, unit_bytes=fixed)

    def states_bytes(self, manifest: Manifest, num_tokens: int) -> int:
        """Return the stored bytes of a unit with `num_tokens` tokens."""
        num_chunks = manifest.unit_tokens // manifest.rows_per_chunk
        empty = num_chunks - -(-num_tokens // manifest.rows_per_chunk)
        tokens = round(self.token_bytes * num_tokens)
        return tokens + self.empty_chunk_bytes * empty + self.unit_bytes


def _stored_form(
    manifest: Manifest, profile: str, states: NDArray[Any]
) -> tuple[NDArray[Any], int, int]:
    """Return states [R, D] as they are encoded, and the bytes of the scales of tokens, channels."""
    if profile in STEPS:
        codes = to_codes(states, step=STEPS[profile])
        scales = len(encode_chunk(codes.token_scale))
        return codes.codes, scales, len(encode_chunk(codes.channel_scale[None]))
    if states.dtype == np.uint16:
        return states, 0, 0
    dtype = manifest.settings["dtype"]
    return bfloat16_bits(states) if dtype == "bfloat16" else states.astype(dtype), 0, 0


def raw_bytes(manifest: Manifest, num_tokens: int) -> int:
    """Return the bytes of the hidden states of `num_tokens` tokens, uncompressed."""
    item_bytes = manifest.states_dtype.itemsize
    return num_tokens * manifest.width * item_bytes * len(manifest.taps)


def receipt_bytes(manifest: Manifest, unit: int) -> int:
    """Return the size of a unit's receipt, up to the digits of a few numbers."""
    digest, num_chunks = "0" * 64, manifest.unit_tokens // manifest.rows_per_chunk
    paths = state_paths(manifest.taps, unit, is_lossy=manifest.is_lossy)
    shards = {shard_path(tap, unit) for tap in manifest.taps}
    largest = raw_bytes(manifest, manifest.unit_tokens) // len(manifest.taps)
    files = {
        path: FileEntry(
            bytes=largest if path in shards else manifest.unit_tokens,
            sha256=digest,
            chunks=["0" * 8] * (num_chunks if path in shards else 0),
        )
        for path in [*(row_path(name, unit) for name in ROW_ARRAYS), *paths]
    }
    receipt = Receipt(
        unit=unit,
        num_tokens=manifest.unit_tokens,
        origin_sha256=digest,
        input_sha256=digest,
        files=files,
        elapsed_s=10.123,
        versions=library_versions(),
    )
    return len(receipt_document(receipt))


def bytes_by_folder(root: Path) -> dict[str, int]:
    """Return the bytes of all files of a store, by the first folder of their path.

    The lock, which names its owner while it is held, does not count.
    """
    sizes: dict[str, int] = {}
    for folder, _, names in os.walk(root):
        first = Path(folder).relative_to(root).parts[:1]
        name = first[0] if first else ""
        paths = (Path(folder, each) for each in names)
        counted = sum(file_bytes(path) for path in paths if path != root / LOCK_PATH)
        sizes[name] = sizes.get(name, 0) + counted
    return sizes


def file_bytes(path: Path) -> int:
    """Return the bytes of a file; 0 if it is missing, as it may be when another writer ends."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
