"""The files of one unit, as arrays.

Every file is held against the size in the unit's receipt, every chunk against its checksum.
Letters: R rows of a unit, D base width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.buffers import BufferPool
from carryon.cache.errors import DamagedStoreError
from carryon.cache.format.arrays import ArrayInfo, array_info, read_chunk
from carryon.cache.format.codec import chunk_checksum, decode_chunk, index_bytes, shard_index
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.quantization import Codes, from_codes
from carryon.cache.format.receipt import Receipt
from carryon.cache.format.zarr_metadata import (
    channel_scale_path,
    row_path,
    shard_path,
    token_scale_path,
)

MOST_FREE = 32
"""Arrays whose memory is kept for later: those of a few units with a few taps."""


_BLOSC_BYTES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyRange:
    """Consecutive rows of a unit, and where they are wanted."""

    first: int
    """First row, counted within the unit."""
    stop: int
    """Row after the last one."""
    to: NDArray[Any]
    """[stop - first, D], C-contiguous, of the store's type: where they are written."""


class UnitFiles:
    """Reader of unit files; remembers the array documents, and memory to read into."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        """Read nothing yet."""
        self._root = root
        self._manifest = manifest
        self._dtype = manifest.states_dtype
        self._is_lossy = manifest.is_lossy
        self._chunk_bytes = manifest.rows_per_chunk * manifest.width * self._dtype.itemsize
        self._infos: dict[str, ArrayInfo] = {}
        self._memory = BufferPool(max_free=MOST_FREE)

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
        out = self._take(rows.stop - rows.start)
        self.copy_states(tap, unit, [CopyRange(first=rows.start, stop=rows.stop, to=out)], receipt)
        return out

    def copy_states(
        self, tap: str, unit: int, moves: Sequence[CopyRange], receipt: Receipt
    ) -> None:
        """Decode rows of a unit's states at a tap straight to where they are wanted.

        One chunk at a time goes through memory that stays in a core's cache; chunks of which no
        row is wanted are not read.

        Args:
            tap: of the store.
            unit: a finished one.
            moves: which rows go where.
            receipt: of the unit.

        Raises:
            DamagedStoreError: as `states`; what was written till then is of no use.
        """
        per_chunk = self._manifest.rows_per_chunk
        wanted = _moves_by_chunk(moves, per_chunk)
        name = f"{self._root} unit {unit} tap {tap}"
        grid = self._grid(tap, unit, receipt) if wanted and self._is_lossy else None
        scratch = self._take(per_chunk)
        for chunk, stored in self._stored_chunks(tap, unit, sorted(wanted), receipt, name=name):
            inside, where = wanted[chunk], f"{name} chunk {chunk}"
            whole = grid is None and inside[0].stop - inside[0].first == per_chunk
            rows = inside[0].to if whole else scratch
            decode_chunk(stored, rows, name=where)
            if chunk_checksum(stored) != receipt.files[shard_path(tap, unit)].chunks[chunk]:
                raise DamagedStoreError(
                    f"{where}: sound, but not the one that was written there: "
                    "run carryon verify, then repair"
                )
            for move in inside[1:] if whole else inside:  # a sample may be wanted twice
                found = rows[move.first - chunk * per_chunk : move.stop - chunk * per_chunk]
                if grid is None:
                    move.to[:] = found
                else:
                    token, channel = grid
                    scales = token[move.first : move.stop]
                    codes = Codes(codes=found, token_scale=scales, channel_scale=channel)
                    from_codes(codes, out=move.to)

    def _stored_chunks(
        self, tap: str, unit: int, chunks: Sequence[int], receipt: Receipt, *, name: str
    ) -> Iterator[tuple[int, memoryview]]:
        """Yield chunks of a shard and their stored bytes, which hold until the next is asked for.

        Each is read on its own: 0.7 of a chunk fits a core's cache, a whole shard does not.
        """
        path = shard_path(tap, unit)
        self._check_size(path, receipt)
        num_chunks = self._manifest.unit_tokens // self._manifest.rows_per_chunk
        end = receipt.files[path].bytes
        size = index_bytes(num_chunks)
        with (self._root / path).open("rb", buffering=0) as file:
            part = _read(file, end - size, memoryview(bytearray(size)))
            index = shard_index(part, num_chunks=num_chunks, name=name)
            largest = max((index[chunk][1] for chunk in chunks), default=0)
            # Of one size for all shards: Blosc adds a few bytes to what it cannot make smaller.
            memory = self._memory.take(max(largest, self._chunk_bytes + _BLOSC_BYTES)).data
            for chunk in chunks:
                offset, num_bytes = index[chunk]
                yield chunk, _read(file, offset, memory[:num_bytes])

    def _grid(
        self, tap: str, unit: int, receipt: Receipt
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the scales of each token [R] and of each channel [D] of a lossy profile."""
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
        return token, channel[0]

    def _take(self, num_rows: int) -> NDArray[Any]:
        """Return memory for stored rows [num_rows, D]."""
        memory = self._memory.take(num_rows * self._manifest.width * self._dtype.itemsize)
        return memory.view(self._dtype).reshape(num_rows, self._manifest.width)

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


def _moves_by_chunk(moves: Sequence[CopyRange], per_chunk: int) -> dict[int, list[CopyRange]]:
    """Return moves cut at the borders of chunks, by chunk."""
    found: dict[int, list[CopyRange]] = {}
    for move in moves:
        for chunk in range(move.first // per_chunk, -(-move.stop // per_chunk)):
            first = max(move.first, chunk * per_chunk)
            stop = min(move.stop, (chunk + 1) * per_chunk)
            cut = CopyRange(
                first=first, stop=stop, to=move.to[first - move.first : stop - move.first]
            )
            found.setdefault(chunk, []).append(cut)
    return found


def _read(file: FileIO, first: int, memory: memoryview) -> memoryview:
    """Return bytes of a file from `first` on, in `memory`; fewer where it ends early, which no
    checksum will fit."""
    file.seek(first)
    got = 0
    while got < len(memory) and (more := file.readinto(memory[got:])):
        got += more
    return memory[:got]
