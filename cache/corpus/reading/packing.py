"""Compressed files: .gz, .bz2, .xz and .zst, read as one stream of bytes."""

import errno
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from carryon.cache.errors import InputError

MAGIC = {".gz": b"\x1f\x8b", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\x00", ".zst": b"\x28\xb5\x2f\xfd"}
"""Suffix of a compression -> the bytes that its files begin with."""
_BUFFER_BYTES = 1 << 20


@contextmanager
def open_file(
    path: Path, packing: str, *, name: str
) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Yield a stream of the unpacked bytes, and a function that returns how far it is in the file.

    Args:
        path: the file.
        packing: a suffix of `MAGIC`; empty for none.
        name: of the file in errors.

    Raises:
        InputError: the file cannot be read, is not what its suffix says, or is damaged; also where
            the block that reads from the stream meets the damage.
    """
    try:
        with path.open("rb", buffering=0) as file:
            if packing and file.read(len(MAGIC[packing])) != MAGIC[packing]:
                raise InputError(
                    f"{name}: expected a file compressed as {packing[1:]}, got other bytes. "
                    f"Fix: rename it without {packing}, or compress it again"
                )
            file.seek(0)
            with io.BufferedReader(_unpack(file, packing), _BUFFER_BYTES) as stream:
                yield stream, lambda: file.tell() if not file.closed else 0
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # of what the block writes
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise InputError(f"{name}: cannot be read: {reason}") from error


def packing_of_magic(head: bytes) -> str:
    """Return the suffix of the compression whose files begin as `head`; empty for none."""
    return next((suffix for suffix, magic in MAGIC.items() if head.startswith(magic)), "")


def _unpack(file: io.FileIO, packing: str) -> io.RawIOBase:
    if packing == ".gz":
        import gzip

        return cast(io.RawIOBase, gzip.GzipFile(fileobj=file))
    if packing == ".bz2":
        import bz2

        return cast(io.RawIOBase, bz2.BZ2File(file))
    if packing == ".xz":
        return cast(io.RawIOBase, lzma.LZMAFile(file))
    if packing == ".zst":
        import pyarrow

        return cast(io.RawIOBase, pyarrow.CompressedInputStream(file, "zstd"))
    return file
