"""The files of one unit, as arrays.

Every file is held against the size in the unit's receipt, every chunk against its checksum.
Letters: R rows of a unit, D base width.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.arrays import ArrayInfo, array_info, read_chunk
from carryon.cache.chunk import chunk_checksum, decode_chunk, index_bytes, shard_index
from carryon.cache.errors import DamagedStoreError
from carryon.cache.layout import channel_scale_path, row_path, shard_path, token_scale_path
from carryon.cache.manifest import Manifest
from carryon.cache.precision import STATE_TYPES, STEPS, Codes, from_codes
from carryon.cache.receipt import FileEntry, Receipt
from carryon.cache.recycle import Recycler


class UnitFiles:
    """Reader of unit files; remembers the array documents, and memory to read into."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        """Read nothing yet."""
        self._root = root
        self._manifest = manifest
        self._infos: dict[str, ArrayInfo] = {}
        self._memory = Recycler()

    def rows(self, name: str, unit: int, receipt: Receipt) -> NDArray[Any]:
        """Return a unit's `tokens`, `loss_mask` or `char_end`, [R]."""
        path = row_path(name, unit)
        self._check_size(path, receipt)
        return read_chunk(self._root, path, self._info(name), sha256=[receipt.files[path].sha256])

    def states(self, tap: str, unit: int, rows: slice, receipt: Receipt) -> NDArray[Any]:
        """Return `rows` of a unit's states at a tap; only the chunks they lie in are read.

        Returns:
            [rows, D] uint16 bits of bfloat16, float16 or float32. Once nobody holds the array,
            its memory is used for another one.

        Raises:
            DamagedStoreError: a file or chunk is not what was written; names unit, tap and chunk.
        """
        per_chunk = self._manifest.rows_per_chunk
        chunks = range(rows.start // per_chunk, -(-rows.stop // per_chunk))
        out = self._take(len(chunks) * per_chunk)
        self._decode(tap, unit, chunks, receipt, out)
        skipped = chunks.start * per_chunk
        wanted = out[rows.start - skipped : rows.stop - skipped]
        if self._manifest.settings["profile"] not in STEPS:
            return wanted
        return self._from_grid(tap, unit, wanted, rows, receipt)

    def _decode(
        self, tap: str, unit: int, chunks: range, receipt: Receipt, out: NDArray[Any]
    ) -> None:
        """Decode consecutive chunks of a unit into `out` [len(chunks) * rows of a chunk, D]."""
        path, name = shard_path(tap, unit), f"{self._root} unit {unit} tap {tap}"
        self._check_size(path, receipt)
        entry, per_chunk = receipt.files[path], self._manifest.rows_per_chunk
        found = self._stored_chunks(path, entry, chunks, name=name)
        for number, (chunk, stored) in enumerate(zip(chunks, found, strict=True)):
            rows = out[number * per_chunk : (number + 1) * per_chunk]
            decode_chunk(stored, rows, name=f"{name} chunk {chunk}")
            if chunk_checksum(stored) != entry.chunks[chunk]:
                raise DamagedStoreError(
                    f"{name} chunk {chunk}: sound, but not the one that was written there: "
                    "run carryon verify, then repair"
                )

    def _stored_chunks(
        self, path: str, entry: FileEntry, chunks: range, *, name: str
    ) -> list[memoryview]:
        """Return the stored bytes of consecutive chunks: one read for a whole shard, else two."""
        num_chunks = self._manifest.unit_tokens // self._manifest.rows_per_chunk
        if len(chunks) == num_chunks:
            shard = self._read(path, 0, entry.bytes)
            index = shard_index(shard, num_chunks=num_chunks, name=name)
            return [shard[offset : offset + size] for offset, size in index]
        size = index_bytes(num_chunks)
        end = self._read(path, entry.bytes - size, size)
        index = shard_index(end, num_chunks=num_chunks, name=name)[chunks.start : chunks.stop]
        first = min((offset for offset, _ in index), default=0)
        stop = max((offset + size for offset, size in index), default=0)
        part = self._read(path, first, min(stop, entry.bytes) - first)
        return [part[offset - first : offset - first + size] for offset, size in index]

    def _read(self, path: str, first: int, num_bytes: int) -> memoryview:
        """Return bytes of a file; fewer where it ends early, which no checksum will fit."""
        memory = self._memory.take(num_bytes).data
        with (self._root / path).open("rb", buffering=0) as file:
            file.seek(first)
            got = 0
            while got < num_bytes and (more := file.readinto(memory[got:])):
                got += more
        return memory[:got]

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
        found = Codes(codes=codes, token_scale=token[rows], channel_scale=channel[0])
        return from_codes(found, out=self._take(len(codes)))

    def _take(self, num_rows: int) -> NDArray[Any]:
        """Return memory for states [num_rows, D]."""
        dtype = np.dtype(STATE_TYPES[self._manifest.settings["dtype"]])
        memory = self._memory.take(num_rows * self._manifest.width * dtype.itemsize)
        return memory.view(dtype).reshape(num_rows, self._manifest.width)

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
