"""JSON documents in their one canonical form, which may hold the SHA-256 of their own content.

Sealed documents from before digests were recorded have none, and are read without that check.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carryon.cache.errors import DamagedFileError
from carryon.cache.files.atomic import write_file
from carryon.cache.files.regular import open_regular

DIGEST = "sha256"
FILES = "files"
"""Digests of the files beside a document; one with them has its own digest too."""
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""An escape that may be half a character."""
MAX_BYTES = 64 << 20
"""Of a document. The largest is the state of a checkpoint: a few numbers a weight."""


def parse_json(content: bytes | str) -> Any:  # noqa: ANN401
    """Return the value of a JSON text.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or has NaN, Infinity or half a character.
    """
    try:
        return _whole(content, json.loads(content, parse_constant=_refuse_constant))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _whole(content: bytes | str, document: Any) -> Any:  # noqa: ANN401
    """Return a document whose texts can be written as UTF-8; an escape may be half a character."""
    if _HALF.search(content if isinstance(content, bytes) else content.encode()):
        json.dumps(document, ensure_ascii=False).encode()  # a UnicodeEncodeError is a ValueError
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"expected finite numbers, got {name}")


def write_json(
    path: Path, document: dict[str, Any], *, is_synced: bool = True, root: Path | None = None
) -> bytes:
    """Write `document` in its one canonical form and return the bytes; see `write_file`."""
    content = json_bytes(document)
    write_file(path, content, is_synced=is_synced, root=root)
    return content


def json_bytes(document: dict[str, Any]) -> bytes:
    """Return the canonical bytes of a JSON document: sorted keys, indent 1, ASCII, newline."""
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode("ascii")


def digest_of(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON document in its canonical form."""
    return hashlib.sha256(json_bytes(dict(document))).hexdigest()


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document with the SHA-256 of its content."""
    return {**document, DIGEST: digest_of(document)}


def read_bounded(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises:
        DamagedFileError: it is no regular file, or is larger.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise DamagedFileError(f"{path}: expected at most {max_bytes:,} bytes, got {size:,}")
        return file.read(max_bytes)


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; unlike that of `parse_json` it may hold NaN and Infinity.

    Raises:
        DamagedFileError: it is no regular file, no JSON within the limits, or no object.
    """
    return _parse_object(read_bounded(path), path)


def _parse_object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        document = _whole(content, json.loads(content))
    except RecursionError as error:
        raise DamagedFileError(f"{path}: expected JSON of a few levels, got deeper ones") from error
    except ValueError as error:
        raise DamagedFileError(f"{path}: expected JSON: {error!s:.200}") from error
    if not isinstance(document, dict):
        raise DamagedFileError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def read_sealed(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return a document without its digest, which is compared with the content.

    Raises:
        DamagedFileError: it is no regular file or not JSON within the limits, or the content has
            changed.
    """
    content = read_bounded(path, max_bytes=max_bytes)
    document = _parse_object(content, path)
    values = {key: value for key, value in document.items() if key != DIGEST}
    if DIGEST not in document:
        if FILES in document:
            raise DamagedFileError(f"{path}: expected its SHA-256 in it, got none")
        return values
    # The bytes are compared too: in another form a changed byte could leave the values as they are.
    try:
        is_whole = json_bytes(sealed(values)) == content
    except RecursionError as error:  # writing takes more of the stack than reading
        raise DamagedFileError(f"{path}: expected JSON of a few levels, got deeper ones") from error
    if not is_whole:
        raise DamagedFileError(f"{path}: the content differs from its SHA-256: it was changed")
    return values
