"""Receipts: the proof that a unit is finished.

A unit without a receipt does not exist. The receipt is written last, after every file of the unit
has reached the disk, and holds the size and SHA-256 of each, and the checksum of each chunk. It
carries a digest of itself, of its unit's input and of what the unit was made with, so that it can
neither be changed nor come from elsewhere, nor can a file that it names.
Receipts lie in the folder of the array `units` (tokens in each unit).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from carryon.cache.errors import DamagedStoreError, UnfinishedStoreError
from carryon.cache.files import json_bytes, write_json
from carryon.cache.format.manifest import Manifest, digest_of
from carryon.cache.format.zarr_metadata import receipt_path


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Size and digest of one file."""

    bytes: int
    sha256: str
    chunks: list[str]
    """crc32c of each chunk of a shard, hex, as it stands at the chunk's end: a read compares
    them, so that a whole shard from elsewhere is not taken for this one. Empty for small files,
    which are compared by SHA-256."""


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
    """Of the libraries that computed it: an extraction may go on under others than it began."""


def write_receipt(root: Path, receipt: Receipt) -> None:
    """Commit a unit."""
    document = asdict(receipt)
    document["sha256"] = digest_of(document)
    write_json(root / receipt_path(receipt.unit), document)


def origin_of(manifest: Manifest, unit: int) -> str:
    """Return the digest of what a unit is made with: base, forward, settings, its corpus."""
    return digest_of(
        {
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
        DamagedStoreError: the receipt was changed, or is of another unit or store.
    """
    path = root / receipt_path(unit)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UnfinishedStoreError(
            f"{root}: unit {unit} is not extracted: run carryon extract again, or carryon repair"
        ) from error
    try:
        document = json.loads(content)
        receipt = _from_document(document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{path}: the receipt is damaged") from error
    if json_bytes(document) != content:
        raise DamagedStoreError(f"{path}: the receipt was changed")
    if (receipt.unit, receipt.origin_sha256) != (unit, origin_of(manifest, unit)):
        raise DamagedStoreError(
            f"{path}: expected the receipt of unit {unit} of this store, got one of unit "
            f"{receipt.unit} that was made with another base, corpus or setting"
        )
    return receipt


def units_with_receipt(root: Path) -> set[int]:
    """Return the units that have a receipt, from one listing of a folder."""
    folder = root / "units"
    if not folder.is_dir():
        return set()
    names = (path.stem for path in folder.iterdir() if path.suffix == ".json")
    return {int(name) for name in names if name.isdecimal()}


def _from_document(document: Mapping[str, Any]) -> Receipt:
    values = dict(document)
    digest = values.pop("sha256")
    if digest_of(values) != digest:
        raise ValueError("digest does not match")
    files = {path: FileEntry(**entry) for path, entry in values.pop("files").items()}
    return Receipt(files=files, **values)
