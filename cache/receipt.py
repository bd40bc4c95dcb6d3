"""Receipts: the proof that a unit is finished.

A unit without a receipt does not exist. The receipt is written last, after every file of the unit
has reached the disk, and holds the size and SHA-256 of each. It carries a digest of itself and
the digest of its unit's input, so that a receipt can neither be changed nor come from elsewhere.
Receipts lie in the folder of the array `units` (tokens in each unit).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from carryon.cache.atomic import json_bytes, write_json
from carryon.cache.errors import DamagedStoreError, UnfinishedStoreError
from carryon.cache.layout import receipt_path
from carryon.cache.manifest import digest_of


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """Size and digest of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What was written for one unit."""

    unit: int
    num_tokens: int
    """Tokens of its samples; the rows after them belong to no sample."""
    input_sha256: str
    """Over settings, starts, lengths, tokens and masks of the unit."""
    files: dict[str, FileEntry]
    """By path relative to the store."""
    elapsed_s: float
    """Seconds of the unit's forward passes and writing."""


def write_receipt(root: Path, receipt: Receipt) -> None:
    """Commit a unit."""
    document = asdict(receipt)
    document["sha256"] = digest_of(document)
    write_json(root / receipt_path(receipt.unit), document)


def read_receipt(root: Path, unit: int) -> Receipt:
    """Read and check the receipt of a unit.

    Raises:
        UnfinishedStoreError: the unit has no receipt.
        DamagedStoreError: the receipt was changed, or is another unit's.
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
        raise DamagedStoreError(f"{path}: the receipt is damaged: run carryon repair") from error
    if json_bytes(document) != content or receipt.unit != unit:
        raise DamagedStoreError(f"{path}: the receipt was changed: run carryon repair")
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
