"""The files of one unit, as arrays.

Every file is held against the size in the unit's receipt, every chunk against its checksum.
Letters: R rows of a unit, D base width.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.arrays import ArrayInfo, array_info, read_chunk
from carryon.cache.chunk import chunk_checksums, decode_shard
from carryon.cache.errors import DamagedStoreError
from carryon.cache.layout import channel_scale_path, row_path, shard_path, token_scale_path
from carryon.cache.manifest import Manifest
from carryon.cache.precision import STATE_TYPES, STEPS, Codes, from_codes
from carryon.cache.receipt import Receipt


class UnitFiles:
    """Reader of unit files; remembers the array documents."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        """Read nothing yet."""
        self._root = root
        self._manifest = manifest
        self._infos: dict[str, ArrayInfo] = {}

    def rows(self, name: str, unit: int, receipt: Receipt) -> NDArray[Any]:
        """Return a unit's `tokens`, `loss_mask` or `char_end`, [R]."""
        path = row_path(name, unit)
        self._check_size(path, receipt)
        return read_chunk(self._root, path, self._info(name), sha256=[receipt.files[path].sha256])

    def states(self, tap: str, unit: int, rows: slice, receipt: Receipt) -> NDArray[Any]:
        """Return `rows` of a unit's states at a tap; only the chunks they lie in are decoded.

        Returns:
            [rows, D] uint16 bits of bfloat16, float16 or float32.

        Raises:
            DamagedStoreError: a file or chunk is not what was written; names unit, tap and chunk.
        """
        manifest, per_chunk = self._manifest, self._manifest.rows_per_chunk
        first_chunk, stop_chunk = rows.start // per_chunk, -(-rows.stop // per_chunk)
        path = shard_path(tap, unit)
        self._check_size(path, receipt)
        stored = np.fromfile(self._root / path, dtype=np.uint8)
        num_chunks, name = manifest.unit_tokens // per_chunk, f"{self._root} unit {unit} tap {tap}"
        dtype = STATE_TYPES[manifest.settings["dtype"]]
        out = np.empty(((stop_chunk - first_chunk) * per_chunk, manifest.width), dtype=dtype)
        decode_shard(
            stored.data,
            out,
            rows_per_chunk=per_chunk,
            num_chunks=num_chunks,
            first_chunk=first_chunk,
            name=name,
        )
        found = chunk_checksums(stored.data, num_chunks=num_chunks, name=name)
        expected = receipt.files[path].chunks
        for chunk in range(first_chunk, stop_chunk):
            if found[chunk] != expected[chunk]:
                raise DamagedStoreError(
                    f"{name} chunk {chunk}: sound, but not the one that was written there: "
                    "run carryon verify, then repair"
                )
        skipped = first_chunk * per_chunk
        wanted = out[rows.start - skipped : rows.stop - skipped]
        if manifest.settings["profile"] not in STEPS:
            return wanted
        return self._from_grid(tap, unit, wanted, rows, receipt)

    def _from_grid(
        self, tap: str, unit: int, codes: NDArray[np.uint16], rows: slice, receipt: Receipt
    ) -> NDArray[np.uint16]:
        token_path, channel_path = token_scale_path(tap, unit), channel_scale_path(tap, unit)
        self._check_size(token_path, receipt)
        self._check_size(channel_path, receipt)
        token, channel = (
            read_chunk(self._root, path, self._info(name), sha256=[receipt.files[path].sha256])
            for path, name in (
                (token_path, f"scale/token/{tap}"),
                (channel_path, f"scale/channel/{tap}"),
            )
        )
        return from_codes(Codes(codes=codes, token_scale=token[rows], channel_scale=channel[0]))

    def _info(self, name: str) -> ArrayInfo:
        if name not in self._infos:
            self._infos[name] = array_info(self._root, name)
        return self._infos[name]

    def _check_size(self, path: str, receipt: Receipt) -> None:
        expected = receipt.files[path].bytes if path in receipt.files else None
        try:
            found = (self._root / path).stat().st_size
        except FileNotFoundError:
            found = None
        if expected is None or found != expected:
            raise DamagedStoreError(
                f"{self._root / path}: expected {expected} bytes as the receipt says, got "
                f"{'no file' if found is None else found}: run carryon verify, then repair"
            )
