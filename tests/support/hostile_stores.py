"""Stores as a stranger would make them: any value, with every digest made valid again."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from carryon.cache.errors import CarryOnError
from carryon.cache.files.documents import digest_of, json_bytes
from carryon.cache.format.codec import encode_chunk
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.receipt import origin_of, units_with_receipt
from carryon.cache.format.zarr_metadata import copy_path, places, receipt_path

Change = Callable[[dict[str, Any]], object]
_CONTENT = ("forward", "corpus", "settings", "width", "rows_per_chunk", "head", "versions")
_NAMES = ("format", "format_version")


def sign_manifest(root: Path, change: Change) -> None:
    """Change the manifest's document, make its digests valid, and write it and its copy.

    Receipts are signed again where the manifest is one that can be read.
    """
    document = json.loads((root / "zarr.json").read_bytes())
    values: dict[str, Any] = document["attributes"]["carryon"]
    values.pop("sha256", None)
    change(values)
    try:
        base = {k: v for k, v in values["base"].items() if k not in ("id", "revision")}
        parts = [
            {k: v for k, v in part.items() if k not in ("report", "kinds")}
            for part in values["parts"]
        ]
        content = {name: values[name] for name in (*_CONTENT, *_NAMES)}
        values["fingerprint"] = digest_of(content | {"base": base, "parts": parts})
    except (KeyError, TypeError, AttributeError, ValueError):
        pass  # without a fingerprint of what is no manifest
    values["sha256"] = digest_of(values)
    content_bytes = json_bytes(document)
    for path in ("zarr.json", copy_path("zarr.json")):
        (root / path).write_bytes(content_bytes)
    try:
        manifest = read_manifest(root)
    except CarryOnError:
        return
    for unit in sorted(units_with_receipt(root) & set(range(min(manifest.num_units, 100)))):
        origin = origin_of(manifest, unit)
        sign_receipt(root, unit, lambda values, origin=origin: values.update(origin_sha256=origin))


def sign_receipt(root: Path, unit: int, change: Change) -> None:
    """Change a receipt and make its digest valid."""
    path = root / receipt_path(unit)
    values = json.loads(path.read_bytes())
    values.pop("sha256", None)
    change(values)
    values["sha256"] = digest_of(values)
    path.write_bytes(json_bytes(values))


def replace_planned(root: Path, path: str, content: bytes) -> None:
    """Replace a file of the plan and its copy, and have the manifest vouch for it."""
    for each in places(path):
        (root / each).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    sign_manifest(root, lambda values: values["files"].update({path: [digest]}))


def replace_of_unit(root: Path, unit: int, path: str, content: bytes) -> None:
    """Replace a file of a unit and its copy, and have the receipt vouch for it."""
    is_shard = path.startswith("hidden/")
    for each in [path] if path.startswith(("hidden/", "scale/")) else places(path):
        (root / each).write_bytes(content)

    def change(values: dict[str, Any]) -> None:
        entry = values["files"][path]
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        if is_shard:
            num_chunks = len(entry["chunks"])
            entry["chunks"] = [checksum.hex() for checksum in _checksums(content, num_chunks)]

    sign_receipt(root, unit, change)


def _checksums(shard: bytes, num_chunks: int) -> list[bytes]:
    end = len(shard) - 16 * num_chunks - 4
    found = []
    for number in range(num_chunks):
        entry = shard[end + 16 * number : end + 16 * number + 16]
        stop = int.from_bytes(entry[:8], "little") + int.from_bytes(entry[8:], "little")
        found.append(shard[stop - 4 : stop].rjust(4, b"\0"))
    return found


def with_checksum(content: bytes) -> bytes:
    """Return bytes with the checksum of a chunk behind them."""
    import google_crc32c

    return content + int(google_crc32c.value(content)).to_bytes(4, "little")


def garbage_chunk(values: Any, harm: Callable[[bytearray], object]) -> bytes:  # noqa: ANN401
    """Return a chunk whose Blosc frame is changed and whose checksum is valid."""
    frame = bytearray(encode_chunk(values)[:-4])
    harm(frame)
    return with_checksum(bytes(frame))
