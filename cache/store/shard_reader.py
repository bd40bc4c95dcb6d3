"""Read the files of one unit as arrays.

Every file is compared with the size in the unit's receipt, every chunk with its checksum.
Letters: R rows of a unit, D base width.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import DamagedStoreError, StoreError
from carryon.cache.files.regular import open_below, open_file_below, stat_below
from carryon.cache.format.arrays import check_tokens, read_chunk, unit_array_info
from carryon.cache.format.codec import (
    CRC_BYTES,
    bytes_of,
    check_raw_chunk,
    chunk_checksum,
    decode_chunk,
    index_bytes,
    raw_chunk_bytes,
    shard_index,
)
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.quantization import Codes, from_codes
from carryon.cache.format.receipt import FileEntry, Receipt
from carryon.cache.format.zarr_metadata import (
    channel_scale_path,
    row_path,
    shard_path,
    state_paths,
    token_scale_path,
)
from carryon.cache.store.buffers import BufferPool

MAX_FREE = 32
"""Arrays whose memory is kept for reuse: those of a few units with a few taps."""
_BLOSC_BYTES = 64
"""Blosc adds a few bytes to data that it cannot compress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyRange:
    """Consecutive rows of a unit, and where to write them."""

    first: int
    """First row, counted within the unit."""
    stop: int
    """Row after the last one."""
    to: NDArray[Any]
    """[stop - first, D], C-contiguous, of the store's type."""


class UnitFiles:
    """Reader of unit files; keeps memory to read into."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        """Read nothing yet."""
        self._root, self._manifest = root, manifest
        self._dtype = manifest.states_dtype
        self._memory = BufferPool(max_free=MAX_FREE)

    def rows(self, name: str, unit: int, receipt: Receipt) -> NDArray[Any]:
        """Return a unit's `tokens`, `loss_mask` or `char_end`, [R].

        Raises:
            DamagedStoreError: a file is not what was written, or a token id is not one of the base.
        """
        path = row_path(name, unit)
        rows = self._chunk_file(name, path, receipt)
        if name == "tokens":
            check_tokens(rows, self._manifest, name=str(self._root / path))
        return rows

    def states(self, tap: str, unit: int, rows: slice, receipt: Receipt) -> NDArray[Any]:
        """Return `rows` of a unit's states at a tap; only the chunks they lie in are read.

        Returns:
            [rows, D] uint16 bits of bfloat16, float16 or float32. Its memory is reused when
            nobody holds the array or a view of it.

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

        One chunk at a time goes through memory that stays in a core's cache. Chunks without a
        wanted row are not read.

        Raises:
            DamagedStoreError: as `states`; the arrays then hold anything.
        """
        per_chunk = self._manifest.rows_per_chunk
        wanted = _split_at_chunks(moves, per_chunk)
        name = f"{self._root} unit {unit} tap {tap}"
        scales = self._scales(tap, unit, receipt) if wanted and self._manifest.is_lossy else None
        scratch = self._take(per_chunk)
        checksums = self._entry(shard_path(tap, unit), receipt).chunks
        for chunk, read in self._chunk_readers(tap, unit, sorted(wanted), receipt, name=name):
            inside, where = wanted[chunk], f"{name} chunk {chunk}"
            is_direct = scales is None and inside[0].stop - inside[0].first == per_chunk
            rows = inside[0].to if is_direct else scratch
            if read(rows, where) != checksums[chunk]:
                raise DamagedStoreError(
                    f"{where}: the checksum is valid but differs from the receipt: the chunk was "
                    "replaced"
                )
            for move in inside[1:] if is_direct else inside:  # a sample may be wanted twice
                part = rows[move.first - chunk * per_chunk : move.stop - chunk * per_chunk]
                if scales is None:
                    move.to[:] = part
                else:
                    token, channel = scales
                    from_codes(
                        Codes(
                            codes=part,
                            token_scale=token[move.first : move.stop],
                            channel_scale=channel[0],
                        ),
                        out=move.to,
                    )

    def states_identity(self, tap: str, unit: int, receipt: Receipt) -> dict[str, Any]:
        """Return what decides a unit's states at a tap: digests of its files, how they are decoded.

        Raises:
            DamagedStoreError: a file is missing or has another size.
        """
        manifest = self._manifest
        paths = state_paths([tap], unit, is_lossy=manifest.is_lossy)
        return {
            "files": [self._entry(path, receipt).sha256 for path in paths],
            "profile": manifest.settings["profile"],
            "dtype": self._dtype.str,
            "width": manifest.width,
            "rows_per_chunk": manifest.rows_per_chunk,
            "unit_tokens": manifest.unit_tokens,
            "num_tokens": receipt.num_tokens,
        }

    def iter_states(self, tap: str, unit: int, receipt: Receipt) -> Iterator[NDArray[Any]]:
        """Yield all rows that belong to samples, chunk by chunk, in memory that is used again.

        Unlike `states` this compares the whole shard with its SHA-256: a chunk with a forged
        checksum is noticed. The rows count once the iterator has ended.

        Raises:
            DamagedStoreError: as `states`, or the shard is not the one of the receipt.
        """
        manifest, path = self._manifest, shard_path(tap, unit)
        with open_file_below(self._root, path) as file:
            before = change_stamp(os.fstat(file.fileno()))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self._entry(path, receipt).sha256:
            raise DamagedStoreError(
                f"{self._root / path}: the content differs from the SHA-256 in the receipt"
            )
        for first in range(0, receipt.num_tokens, manifest.rows_per_chunk):
            stop = min(first + manifest.rows_per_chunk, receipt.num_tokens)
            yield self.states(tap, unit, slice(first, stop), receipt)
        if change_stamp(stat_below(self._root, path)) != before:
            raise DamagedStoreError(f"{self._root / path}: it was changed while it was read")

    def _chunk_readers(
        self, tap: str, unit: int, chunks: Sequence[int], receipt: Receipt, *, name: str
    ) -> Iterator[tuple[int, Callable[[NDArray[Any], str], str]]]:
        """Yield chunks of a shard and, for each, what reads it; valid until the next one.

        It takes rows to fill and a name for errors, and returns the chunk's checksum, hex. A
        chunk is read separately: a compressed one fits a core's cache, a whole shard does not.
        A raw one is read straight into the rows.
        """
        path = shard_path(tap, unit)
        end = self._entry(path, receipt).bytes
        num_chunks = self._manifest.unit_tokens // self._manifest.rows_per_chunk
        size = index_bytes(num_chunks)
        if end < size:
            raise DamagedStoreError(f"{name}: index is damaged")
        with os.fdopen(open_below(self._root, path), "rb", buffering=0) as file:
            part = _read(file, end - size, memoryview(bytearray(size)))
            index = shard_index(part, num_chunks=num_chunks, name=name, file_bytes=end)
            if self._manifest.is_raw:
                for chunk in chunks:
                    yield chunk, partial(_read_raw, file, *index[chunk])
                return
            # One size for all shards, so that its memory is reused.
            largest = max((index[chunk][1] for chunk in chunks), default=0)
            raw = self._manifest.rows_per_chunk * self._manifest.width * self._dtype.itemsize
            memory = self._memory.take(max(largest, raw + _BLOSC_BYTES)).data
            for chunk in chunks:
                offset, num_bytes = index[chunk]
                yield chunk, partial(_read_packed, file, offset, memory[:num_bytes])

    def _scales(self, tap: str, unit: int, receipt: Receipt) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the scales of tokens [R] and of channels [1, D] of a lossy profile."""
        return (
            self._chunk_file(f"scale/token/{tap}", token_scale_path(tap, unit), receipt),
            self._chunk_file(f"scale/channel/{tap}", channel_scale_path(tap, unit), receipt),
        )

    def _chunk_file(self, name: str, path: str, receipt: Receipt) -> NDArray[Any]:
        """Return the only chunk that a unit has of the array `name`."""
        entry = self._entry(path, receipt)
        info = unit_array_info(self._manifest, name)
        return read_chunk(self._root, path, info, sha256=[entry.sha256])

    def _take(self, num_rows: int) -> NDArray[Any]:
        """Return memory for stored rows [num_rows, D]."""
        width = self._manifest.width
        num_bytes = num_rows * width * self._dtype.itemsize
        try:
            memory = self._memory.take(num_bytes)
        except MemoryError as error:
            raise StoreError(
                f"{self._root}: expected memory for {num_bytes} bytes of states, got too little. "
                "Fix: read parts of samples in place of units"
            ) from error
        return memory.view(self._dtype).reshape(num_rows, width)

    def _entry(self, path: str, receipt: Receipt) -> FileEntry:
        """Return what the receipt says of a file, after comparing its size."""
        entry = receipt.files.get(path)
        try:
            size = stat_below(self._root, path).st_size
        except FileNotFoundError:
            size = None
        if entry is None or size != entry.bytes:
            raise DamagedStoreError(
                f"{self._root / path}: expected {entry and entry.bytes} bytes as the receipt says, "
                f"got {'no file' if size is None else size}"
            )
        return entry


def decode_shard(
    content: bytes, manifest: Manifest, checksums: Sequence[str], *, name: str
) -> Iterator[NDArray[Any]]:
    """Yield the rows of each chunk of a whole shard, in memory that is used again.

    Args:
        content: of the shard.
        manifest: of the store.
        checksums: of each chunk, as the receipt says.
        name: of the shard, for errors.

    Raises:
        DamagedStoreError: a chunk does not decode, or is not the one of the receipt.
    """
    stored, shape = memoryview(content), (manifest.rows_per_chunk, manifest.width)
    index = shard_index(stored, num_chunks=len(checksums), name=name)
    rows = np.empty(shape, dtype=manifest.states_dtype)
    for number, ((offset, size), checksum) in enumerate(zip(index, checksums, strict=True)):
        where, chunk = f"{name} chunk {number}", stored[offset : offset + size]
        decode_chunk(chunk, rows, name=where, is_raw=manifest.is_raw)
        if chunk_checksum(chunk) != checksum:
            raise DamagedStoreError(f"{where}: its checksum differs from the receipt")
        yield rows


def check_finite(values: NDArray[Any], *, name: str) -> None:
    """Check that states or scales are numbers; uint16 is read as bits of bfloat16.

    Raises:
        DamagedStoreError: one is NaN or infinite; `name` says of what.
    """
    if not is_finite(values).all():
        raise DamagedStoreError(f"{name}: expected finite states, got NaN or infinity")


def are_finite(values: NDArray[Any]) -> bool:
    """Tell whether all values are finite; uint16 is read as bits of bfloat16."""
    if values.dtype != np.uint16 or not values.size:
        return bool(is_finite(values).all())
    # Two maxima make no array of the size of the states: a fifth of the time.
    return bool(values.view(np.int16).max() < 0x7F80 and values.max() < 0xFF80)


def is_finite(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Tell of each value whether it is finite; uint16 is read as bits of bfloat16."""
    if values.dtype == np.uint16:  # not finite where the exponent is all ones
        return np.asarray((values & 0x7F80) != 0x7F80)
    return np.asarray(np.isfinite(values))


def change_stamp(facts: os.stat_result) -> tuple[int, ...]:
    """Return what differs after a file was changed or replaced."""
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _split_at_chunks(moves: Sequence[CopyRange], per_chunk: int) -> dict[int, list[CopyRange]]:
    """Return moves cut at the borders of chunks, by chunk."""
    parts: dict[int, list[CopyRange]] = {}
    for move in moves:
        for chunk in range(move.first // per_chunk, -(-move.stop // per_chunk)):
            first = max(move.first, chunk * per_chunk)
            stop = min(move.stop, (chunk + 1) * per_chunk)
            to = move.to[first - move.first : stop - move.first]
            parts.setdefault(chunk, []).append(CopyRange(first=first, stop=stop, to=to))
    return parts


def _read_packed(
    file: FileIO, first: int, memory: memoryview, rows: NDArray[Any], name: str
) -> str:
    """Read a compressed chunk into `memory`, decode it into `rows`, return its checksum, hex."""
    stored = _read(file, first, memory)
    decode_chunk(stored, rows, name=name)
    return chunk_checksum(stored)


def _read_raw(file: FileIO, first: int, num_bytes: int, rows: NDArray[Any], name: str) -> str:
    """Read a raw chunk into `rows`, and return its checksum, hex."""
    if num_bytes != raw_chunk_bytes(rows):
        raise DamagedStoreError(f"{name}: expected {raw_chunk_bytes(rows)} bytes, got {num_bytes}")
    _read(file, first, bytes_of(rows).data)
    crc = _read(file, first + rows.nbytes, memoryview(bytearray(CRC_BYTES)))
    check_raw_chunk(rows, crc, name=name)
    return crc.hex()


def _read(file: FileIO, first: int, memory: memoryview) -> memoryview:
    """Read bytes from `first` on into `memory`; fewer, which no checksum matches, at the end."""
    file.seek(first)
    got = 0
    while got < len(memory) and (more := file.readinto(memory[got:])):
        got += more
    return memory[:got]
