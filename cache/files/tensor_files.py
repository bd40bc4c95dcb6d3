"""Digests of safetensors files, whose size is compared with their header before they are read.

A file that says it holds little and is a terabyte long, which costs its maker nothing where a
file system keeps no zeros, would otherwise be hashed for an hour.
"""

import hashlib
import json
from io import BufferedReader
from pathlib import Path

from carryon.cache.errors import DamagedFileError
from carryon.cache.files.regular import open_regular

_MAX_HEADER_BYTES = 100_000_000
"""As in safetensors."""
_METADATA = "__metadata__"


def digest_tensors(path: Path) -> str:
    """Return the SHA-256 (hex) of a safetensors file.

    Raises:
        DamagedFileError: it is no regular file, or its size is not the one that its header tells.
    """
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        if size != _told_size(file):
            raise DamagedFileError(
                f"{path}: expected the size that its header tells, got {size:,} bytes: the file "
                "was changed"
            )
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _told_size(file: BufferedReader) -> int | None:
    """Return the size that a header tells; None if it is none."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= _MAX_HEADER_BYTES:
        return None
    try:
        header = json.loads(file.read(length))
        ends = [int(entry["data_offsets"][1]) for key, entry in header.items() if key != _METADATA]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    return 8 + length + max(ends, default=0)
