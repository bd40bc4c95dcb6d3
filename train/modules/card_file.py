"""The card of a carry-on as a file: read within limits, signed, and compared with its digests.

`sha256` is of the card's own content, `files` holds the SHA-256 of the files beside it. Carry-ons
from before digests were recorded have neither, and are read without these checks.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carryon.cache.errors import DamagedFileError, InputError
from carryon.cache.files.documents import FILES, read_sealed, sealed
from carryon.cache.files.regular import digest_file, open_regular
from carryon.cache.files.tensor_files import digest_tensors

WEIGHTS = "carryon.safetensors"
GATE = "gate.safetensors"
"""Beside the weights of a carry-on that was trained in a mixture of several bases."""
MAX_GATE_BYTES = 32 << 20
"""Of a gate: half of it is enough for the widest base and the most sources."""
CARD = "carryon.json"
README = "README.md"
MAX_CARD_BYTES = 8 << 20
"""The largest part is a chat template of MAX_TEMPLATE_CHARS."""


def signed(values: Mapping[str, Any], *, files: Mapping[str, str]) -> dict[str, Any]:
    """Return the document of a card: its values, the digests of `files` and its own."""
    return sealed(dict(values) | {FILES: dict(files)})


def read_signed(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a card, and the digests of the files beside it; of an old card none.

    Raises:
        InputError: not JSON within the limits, or the content does not match its digest.
    """
    try:
        values = read_sealed(_place(path), max_bytes=MAX_CARD_BYTES)
    except DamagedFileError as error:
        raise InputError(
            f"{error}. Fix: download it again, or set alpha with carryon evaluate --write-alpha"
        ) from error
    files = values.pop(FILES, {})
    if not isinstance(files, dict) or not all(map(_is_digest, files.values())):
        raise InputError(f"{path}: files: expected SHA-256 digests, got {files!r:.80}")
    return values, files


def check_digest(path: Path, expected: str | None) -> None:
    """Compare a file with its recorded digest; None, of an old carry-on, is not compared.

    Raises:
        InputError: they differ, or it is no regular file.
    """
    try:
        place = _place(path)
        if path.name == GATE:
            _check_gate_size(place)
        got = digest_tensors(place) if path.name in (WEIGHTS, GATE) else digest_file(place)
    except DamagedFileError as error:
        raise InputError(f"{error}. Fix: download it again") from error
    if expected is not None and got != expected:
        raise InputError(
            f"{path}: expected the SHA-256 {expected[:12]} that {CARD} records, got {got[:12]}: "
            "the file was changed. Fix: download it again, or run carryon train again"
        )


def _check_gate_size(path: Path) -> None:
    with open_regular(path) as file:
        size = file.seek(0, 2)
    if size > MAX_GATE_BYTES:
        raise DamagedFileError(f"{path}: expected at most {MAX_GATE_BYTES:,} bytes, got {size:,}")


def _place(path: Path) -> Path:
    """Return a file itself, or the blob that it links to in a snapshot of the hub's cache."""
    if path.parent.parent.name == "snapshots":
        target = path.resolve()
        if target.parent == path.parents[2].resolve() / "blobs":
            return target
    return path


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64
