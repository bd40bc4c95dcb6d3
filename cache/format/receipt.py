"""Receipts: a unit exists once its receipt does.

A receipt is written last, after every file of its unit has reached the disk. It holds size and
SHA-256 of each file and the checksum of each chunk, and digests of itself, of the unit's input and
of what made the unit: a receipt or file that was changed, or that belongs elsewhere, is refused.
Receipts are in the folder of the array `units` (tokens in each unit).
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from carryon.cache.errors import DamagedStoreError, UnfinishedStoreError
from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import digest_of, json_bytes, parse_json
from carryon.cache.files.regular import names_below, read_below
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.schema import MAX_RECEIPT_BYTES, check_receipt
from carryon.cache.format.zarr_metadata import receipt_path

_RECEIPT_NAME = re.compile("(0|[1-9][0-9]{0,8})[.]json")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Size and digest of one file."""

    bytes: int
    sha256: str
    chunks: list[str]
    """crc32c, hex, of each chunk of a shard: a valid shard from elsewhere is refused when it is
    read. Empty for small files, whose SHA-256 is compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What was written for one unit."""

    unit: int
    num_tokens: int
    """Tokens of its samples; the rows after them belong to no sample."""
    origin_sha256: str
    """See `origin_of`."""
    input_sha256: str
    """Over the origin, and starts, lengths, tokens, masks and character ends of the unit."""
    files: dict[str, FileEntry]
    """By path relative to the store."""
    elapsed_s: float
    """Seconds of the unit's forward passes and writing."""
    versions: dict[str, str]
    """Of the libraries that computed it; an extraction may be resumed under other versions."""


def write_receipt(root: Path, receipt: Receipt) -> None:
    """Commit a unit."""
    write_file(root / receipt_path(receipt.unit), receipt_document(receipt), root=root)


def receipt_document(receipt: Receipt) -> bytes:
    """Return a receipt as it is written, with a digest of itself."""
    document = asdict(receipt)
    document["sha256"] = digest_of(document)
    return json_bytes(document)


def origin_of(manifest: Manifest, unit: int) -> str:
    """Return the digest of what a unit is made with: base, forward, settings, its corpus."""
    alignment = {"alignment": manifest.alignment} if manifest.alignment else {}
    return digest_of(
        alignment
        | {
            "base": manifest.base_content,
            "forward": manifest.forward,
            "settings": manifest.settings,
            "width": manifest.width,
            "corpus": manifest.part_of(unit).fingerprint,
            "unit": unit,
        }
    )


def read_receipt(root: Path, manifest: Manifest, unit: int) -> Receipt:
    """Read and check the receipt of a unit.

    Raises:
        UnfinishedStoreError: the unit has no receipt.
        DamagedStoreError: the receipt was changed, or is another unit's or store's.
    """
    path = root / receipt_path(unit)
    try:
        content = read_below(root, receipt_path(unit), max_bytes=MAX_RECEIPT_BYTES)
    except FileNotFoundError as error:
        raise UnfinishedStoreError(
            f"{root}: unit {unit} is not extracted. Fix: carryon extract again, or carryon repair"
        ) from error
    return parse_receipt(content, manifest, unit, name=str(path))


def has_receipt(root: Path, manifest: Manifest, unit: int) -> bool:
    """Return whether a unit has a valid receipt of this store."""
    try:
        read_receipt(root, manifest, unit)
    except (UnfinishedStoreError, DamagedStoreError):
        return False
    return True


def parse_receipt(content: bytes, manifest: Manifest, unit: int, *, name: str) -> Receipt:
    """Return the receipt of a unit from the content of its file, called `name` in errors.

    Raises:
        DamagedStoreError: it was changed, or is another unit's or store's.
    """
    try:
        receipt = _parse(content, manifest, unit)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{name}: the receipt is damaged: {error}") from error
    if (receipt.unit, receipt.origin_sha256) != (unit, origin_of(manifest, unit)):
        raise DamagedStoreError(
            f"{name}: expected the receipt of unit {unit} of this store, got one of unit "
            f"{receipt.unit} that was made with another base, corpus or setting"
        )
    return receipt


def units_with_receipt(root: Path) -> set[int]:
    """Return the units that have a receipt, from one listing of a folder."""
    matches = map(_RECEIPT_NAME.fullmatch, names_below(root, "units"))
    return {int(match[1]) for match in matches if match}


def _parse(content: bytes, manifest: Manifest, unit: int) -> Receipt:
    values: dict[str, Any] = parse_json(content)
    is_canonical = json_bytes(values) == content
    digest = values.pop("sha256")
    if not is_canonical or digest_of(values) != digest:
        raise ValueError("not in the form it was written in, or the digest does not match")
    check_receipt(
        values,
        unit=unit,
        taps=manifest.taps,
        unit_tokens=manifest.unit_tokens,
        rows_per_chunk=manifest.rows_per_chunk,
        row_bytes=manifest.width * manifest.states_dtype.itemsize,
        is_lossy=manifest.is_lossy,
    )
    files = {path: FileEntry(**entry) for path, entry in values.pop("files").items()}
    return Receipt(files=files, **values)
