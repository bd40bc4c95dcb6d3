"""Check the header of a .gguf file before the package gguf reads it.

The package reads what lies behind the end of a file as nothing, so that a list of 2^60 numbers in a
small file fills the memory. Here every length is compared with the size of the file, and the number
of blocks with that of the tensors. The format: docs/gguf.md of github.com/ggml-org/ggml.
"""

import mmap
import struct
from pathlib import Path

from carryon.cache.errors import InputError

_MAGIC = b"GGUF"
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a number, by the number of its type."""
_UINT32, _STRING, _LIST = 4, 8, 9
_COUNTS = struct.calcsize("<4sIQQ")
_HIGHEST_ORDERED = 65536
"""Versions are below it; one that is not is of the other byte order."""


def check_gguf(path: Path) -> None:
    """Check that a header ends within its file and names no more blocks than there are tensors.

    What is no .gguf file at all is left to its reader.

    Raises:
        InputError: it claims more than the file holds, or counts blocks in another type than
            the format's uint32.
    """
    if path.stat().st_size < _COUNTS:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != _MAGIC:
            return
        try:
            tensors, blocks = _read_counts(data, path)
        except (struct.error, RecursionError) as error:
            raise InputError(
                f"base {path}: expected a header that ends within the file of {len(data):,} bytes, "
                "got one that claims more. Fix: get the file again"
            ) from error
    if blocks > tensors:
        raise InputError(
            f"base {path}: expected at most {tensors:,} blocks, as there are tensors, got "
            f"{blocks:,}. Fix: get the file again"
        )


def _read_counts(data: mmap.mmap, path: Path) -> tuple[int, int]:
    """Return the numbers of tensors and of blocks; struct.error where the file ends before.

    Of a name that is there twice, the largest number counts: readers differ in which they take.
    """
    [version] = struct.unpack_from("<I", data, 4)
    order = "<" if version < _HIGHEST_ORDERED else ">"
    tensors, count = struct.unpack_from(f"{order}QQ", data, 8)
    at, blocks = _COUNTS, 0
    for _ in range(count):
        start, at = at, _end_of(data, at, _STRING, order)
        name = data[start + 8 : at]
        [kind] = struct.unpack_from(f"{order}I", data, at)
        start, at = at + 4, _end_of(data, at + 4, kind, order)
        if name.endswith(b".block_count"):
            if kind != _UINT32:
                raise InputError(
                    f"base {path}: expected a block_count of type {_UINT32} (uint32), got type "
                    f"{kind}. Fix: get the file again"
                )
            blocks = max(blocks, *struct.unpack_from(f"{order}I", data, start))
    return tensors, blocks


def _end_of(data: mmap.mmap, at: int, kind: int, order: str) -> int:
    """Return where a value of a type that starts at `at` ends."""
    if kind == _STRING:
        [length] = struct.unpack_from(f"{order}Q", data, at)
        at += 8 + length
    elif kind == _LIST:
        item, count = struct.unpack_from(f"{order}IQ", data, at)
        at += 12
        if item in _BYTES:
            at += count * _BYTES[item]
        else:
            for _ in range(count):
                at = _end_of(data, at, item, order)
    elif kind in _BYTES:
        at += _BYTES[kind]
    else:
        raise struct.error(f"type {kind}")
    if at > len(data):
        raise struct.error("the file ends")
    return at
