"""Encode and decode chunks and shards, to the same bytes as zarr-python's codecs.

A chunk is Blosc (zstd level 1, byte shuffle, one block) and its crc32c. A shard is its chunks,
then an index of (offset, bytes) pairs as little-endian uint64, then the crc32c of the index. The
chunks of a raw shard are their rows as they are in memory and the crc32c: no Blosc.
zarr-python spends three quarters of a read on tasks and copies; here a chunk is decoded straight
into its destination.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from carryon.cache.errors import DamagedStoreError

_MAX_THREADS = 8
"""Threads that encode a shard at most."""
ChunkMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
CRC_BYTES = 4
"""Of the checksum that ends a chunk."""
_HEADER_BYTES = 16  # of Blosc
_ENTRY_BYTES = 16


def encode_chunk(rows: NDArray[Any]) -> bytes:
    """Return the stored bytes of `rows`, any shape, C-contiguous."""
    return b"".join(chunk_parts(rows))


def chunk_parts(rows: NDArray[Any], *, is_raw: bool = False) -> tuple[bytes | memoryview, bytes]:
    """Return content and checksum of a chunk, any shape, C-contiguous.

    `is_raw`: as it is, not compressed; the content is the memory of `rows`.
    """
    rows = np.ascontiguousarray(rows)
    if is_raw:
        content = bytes_of(rows).data
        return content, _crc(content)
    shuffle = blosc.SHUFFLE if rows.itemsize > 1 else blosc.NOSHUFFLE
    packed: bytes = blosc.compress(rows, b"zstd", 1, shuffle, rows.nbytes)
    return packed, _crc(packed)


def decode_chunk(stored: memoryview, out: NDArray[Any], *, name: str, is_raw: bool = False) -> None:
    """Decode `stored` into `out`, a C-contiguous array of the chunk's shape.

    Raises:
        DamagedStoreError: the checksum or the size does not fit; `name` says which chunk.
    """
    packed = stored[:-CRC_BYTES]
    if len(stored) <= CRC_BYTES or _crc(packed) != bytes(stored[-CRC_BYTES:]):
        raise DamagedStoreError(f"{name}: checksum does not match")
    if is_raw:
        if len(packed) != out.nbytes:
            raise DamagedStoreError(f"{name}: expected {out.nbytes} bytes, got {len(packed)}")
        bytes_of(out)[:] = np.frombuffer(packed, dtype=np.uint8)
        return
    if len(packed) < _HEADER_BYTES:  # Blosc reads its header without asking for the length
        raise DamagedStoreError(f"{name}: expected a Blosc frame, got {len(packed)} bytes")
    num_bytes, packed_bytes, block_bytes = blosc._cbuffer_sizes(packed)
    if num_bytes != out.nbytes:
        raise DamagedStoreError(f"{name}: expected {out.nbytes} bytes, got {num_bytes}")
    if packed_bytes != len(packed) or block_bytes > max(num_bytes, 1):
        raise DamagedStoreError(f"{name}: the sizes in its Blosc header do not match the chunk")
    try:
        blosc.decompress(packed, out)
    except (RuntimeError, ValueError) as error:
        raise DamagedStoreError(f"{name}: Blosc cannot decompress it") from error


def check_raw_chunk(rows: NDArray[Any], crc: bytes | memoryview, *, name: str) -> None:
    """Compare `rows`, a chunk that was read into its place, with the checksum behind it.

    Raises:
        DamagedStoreError: it does not match; `name` says which chunk.
    """
    if _crc(bytes_of(rows).data) != bytes(crc):
        raise DamagedStoreError(f"{name}: checksum does not match")


def raw_chunk_bytes(rows: NDArray[Any]) -> int:
    """Return the stored bytes of `rows` as a raw chunk."""
    return rows.nbytes + CRC_BYTES


def encode_shard(rows: NDArray[Any], *, rows_per_chunk: int, is_raw: bool = False) -> bytes:
    """Return the stored bytes of a unit's `rows` [R, D]; R is a multiple of `rows_per_chunk`.

    `is_raw`: as they are, not compressed.
    """
    rows_of_chunks = np.split(rows, range(rows_per_chunk, rows.shape[0], rows_per_chunk))
    with chunk_mapper(len(rows_of_chunks)) as each:
        chunks = list(each(partial(chunk_parts, is_raw=is_raw), rows_of_chunks))
    return b"".join([*chain.from_iterable(chunks), shard_index_bytes(chunks)])


def shard_index_bytes(chunks: Sequence[Sequence[bytes | memoryview]]) -> bytes:
    """Return the index that ends a shard, from the parts of each of its chunks."""
    sizes = np.array([sum(map(len, parts)) for parts in chunks], dtype="<u8")
    offsets = np.cumsum(sizes, dtype="<u8") - sizes
    entries = np.stack([offsets, sizes], axis=1).tobytes()
    return entries + _crc(entries)


@contextmanager
def chunk_mapper(count: int, pool: ThreadPoolExecutor | None = None) -> Iterator[ChunkMap]:
    """Yield a function like `map` for the chunks of a shard; results come in order.

    Half of the cores encode, as the other half may compute states: one core is slower than a GPU.

    Args:
        count: chunks there are.
        pool: threads that encode. None: some that end with the block.
    """
    threads = min(_MAX_THREADS, (os.cpu_count() or 1) // 2, count)
    if pool is not None:
        yield pool.map
    elif threads < 2:
        yield map
    else:
        with ThreadPoolExecutor(threads, "carryon-encoder") as own:
            yield own.map


def index_bytes(num_chunks: int) -> int:
    """Return the bytes of a shard's index, which is the end of the shard."""
    return num_chunks * _ENTRY_BYTES + CRC_BYTES


def shard_index(
    stored: memoryview, *, num_chunks: int, name: str, file_bytes: int | None = None
) -> list[tuple[int, int]]:
    """Return (offset, bytes) of each chunk of a shard; each lies within the file.

    Args:
        stored: the whole shard, or its end, with all of the index.
        num_chunks: chunks in the shard.
        name: of the shard, for errors.
        file_bytes: size of the whole shard. None: `stored` is all of it.

    Raises:
        DamagedStoreError: the index is cut off, or does not match its checksum or the file.
    """
    size = index_bytes(num_chunks)
    entries = stored[len(stored) - size : len(stored) - CRC_BYTES]
    if len(stored) < size or _crc(entries) != bytes(stored[-CRC_BYTES:]):
        raise DamagedStoreError(f"{name}: index is damaged")
    pairs = np.frombuffer(entries, dtype="<u8").reshape(num_chunks, 2).tolist()
    end = (len(stored) if file_bytes is None else file_bytes) - size
    if any(offset + num_bytes > end for offset, num_bytes in pairs):
        raise DamagedStoreError(f"{name}: index points outside of the file")
    return [(int(offset), int(num_bytes)) for offset, num_bytes in pairs]


def chunk_checksum(stored: memoryview) -> str:
    """Return the crc32c that ends a chunk, hex."""
    return bytes(stored[-CRC_BYTES:]).hex()


def bytes_of(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the memory of a C-contiguous array as bytes, [rows.nbytes]."""
    return rows.reshape(-1).view(np.uint8)


def _crc(content: bytes | memoryview) -> bytes:
    # google_crc32c takes arrays of a read-only buffer, but no memoryview.
    view = np.frombuffer(content, dtype=np.uint8)
    view.flags.writeable = False
    return int(google_crc32c.value(view)).to_bytes(CRC_BYTES, "little")
