"""The card of a carry-on as a file: read within limits, signed, and compared with its digests.

`sha256` is of the card's own content, `files` holds the SHA-256 of the files beside it. Carry-ons
from before digests were recorded have neither, and are read without these checks.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.files import json_bytes
from carryon.cache.format.manifest import digest_of

WEIGHTS = "carryon.safetensors"
CARD = "carryon.json"
README = "README.md"
MAX_CARD_BYTES = 8 << 20
"""The largest part is a chat template of MAX_TEMPLATE_CHARS."""
_DIGESTS = ("files", "sha256")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    A link is followed only from a snapshot of the hub's cache to the blobs beside it.

    Raises:
        InputError: a link, a folder, a device or a pipe.
    """
    place, is_cached = path, path.parent.parent.name == "snapshots"
    if is_cached and path.is_symlink():
        target = path.resolve()
        if target.parent == path.parent.parent.parent.resolve() / "blobs":
            place = target
    try:
        # Without O_NONBLOCK a pipe would wait for a writer.
        handle = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        got = "a link" if place.is_symlink() else error.strerror
        raise InputError(f"{path}: expected a file, got {got}. Fix: download it again") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(f"{path}: expected a file, got something else. Fix: download it again")
    return os.fdopen(handle, "rb")


def digest_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a regular file; raises as `open_regular` does."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def signed(values: Mapping[str, Any], *, files: Mapping[str, str]) -> dict[str, Any]:
    """Return the document of a card: its values, the digests of `files` and its own."""
    document = dict(values) | {"files": dict(files)}
    return document | {"sha256": digest_of(document)}


def read_signed(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a card, and the digests of the files beside it; of an old card none.

    Raises:
        InputError: not JSON within the limits, or the content does not match its digest.
    """
    with open_regular(path) as file:
        content = file.read(MAX_CARD_BYTES + 1)
    if len(content) > MAX_CARD_BYTES:
        raise InputError(f"{path}: expected at most {MAX_CARD_BYTES:,} bytes, got more")
    try:
        document = json.loads(content)
    except RecursionError as error:
        raise InputError(f"{path}: expected JSON of a few levels, got deeper ones") from error
    except ValueError as error:
        raise InputError(f"{path}: expected JSON: {error!s:.200}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(document).__name__}")
    if "sha256" not in document:
        return document, {}
    values = {name: value for name, value in document.items() if name not in _DIGESTS}
    files = document.get("files")
    is_listed = isinstance(files, dict) and all(map(_is_digest, files.values()))
    # In any other form a changed byte could leave the values as they are.
    is_sound = is_listed and document == signed(values, files=files or {})
    if not is_sound or json_bytes(document) != content:
        raise InputError(
            f"{path}: the content differs from its SHA-256: the file was changed. Fix: download "
            "it again, or set alpha with carryon evaluate --write-alpha"
        )
    return values, dict(files or {})


def check_digest(path: Path, expected: str | None) -> None:
    """Compare a file with its recorded digest; None, of an old carry-on, is not compared.

    Raises:
        InputError: they differ, or it is no regular file.
    """
    got = digest_file(path)
    if expected is not None and got != expected:
        raise InputError(
            f"{path}: expected the SHA-256 {expected[:12]} that {CARD} records, got {got[:12]}: "
            "the file was changed. Fix: download it again, or run carryon train again"
        )


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64
