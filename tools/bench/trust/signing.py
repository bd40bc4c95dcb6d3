"""Stores as a stranger would make them: any value, with every digest made valid again."""

import contextlib
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from carryon.cache.base.identity import digest_chat_template, digest_config, digest_tokenizer
from carryon.cache.errors import CarryOnError
from carryon.cache.files.documents import digest_of, json_bytes, sealed
from carryon.cache.format.codec import encode_chunk
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.receipt import origin_of, units_with_receipt
from carryon.cache.format.zarr_metadata import copy_path, places, receipt_path
from carryon.train.trainer.run_documents import lines_bytes

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
        if values.get("alignment"):
            content["alignment"] = values["alignment"]
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
        sign_receipt(root, unit, partial(dict.update, origin_sha256=origin))


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


def sign(root: Path, path: str) -> None:
    """Make the digests of a store, run, lineage or carry-on valid for a file that has changed.

    What no longer parses is left as it is, beside the digests of other files over it.

    Args:
        root: folder of the thing.
        path: of the changed file, relative to it.
    """
    file = root / path
    if (root / "zarr.json").exists():
        _sign_of_store(root, path)
    elif file.name == "carryon.json" or file.suffix == ".json":
        _reseal(file, lambda values: None)
    elif file.suffix == ".jsonl":
        _sign_lines(file)
    elif file.parent.name.startswith("step-"):
        _reseal(file.parent / "state.json", lambda values: _vouch(values, file))
    elif (file.parent / "carryon.json").exists():
        _reseal(file.parent / "carryon.json", lambda values: _vouch(values, file))


def sign_base(folder: Path, *documents: Path) -> None:
    """Let cards and manifests vouch for a base in `folder`, as far as it can be loaded."""
    digests = _digests_of_base(folder)
    for path in documents:
        _change_base(path, digests)


def name_base(document: Path, name: str) -> None:
    """Let a card or a manifest name its base by `name`."""
    _change_base(document, {"id": name})


def _change_base(path: Path, values: dict[str, Any]) -> None:
    def change(document: dict[str, Any]) -> None:
        document["base"].update(values)

    if path.name == "zarr.json":
        sign_manifest(path.parent, change)
    else:
        _reseal(path, change)


def _digests_of_base(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig, AutoTokenizer

    found: dict[str, Any] = {}
    with contextlib.suppress(Exception):
        found["config_sha256"] = digest_config(AutoConfig.from_pretrained(folder))
    with contextlib.suppress(Exception):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found["tokenizer_sha256"] = digest_tokenizer(tokenizer)
        found["chat_template_sha256"] = digest_chat_template(tokenizer)
    return found


def _sign_of_store(root: Path, path: str) -> None:
    content = (root / path).read_bytes()
    with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError, RecursionError):
        if path == "zarr.json":
            sign_manifest(root, lambda values: None)
        elif path.startswith("units/") and path.count("/") == 1 and path != "units/zarr.json":
            sign_receipt(root, int(Path(path).stem), lambda values: None)
        else:
            replace_planned(root, path, content)


def _sign_lines(file: Path) -> None:
    rows = file.read_bytes().split(b"\n")
    for number, row in enumerate(rows):
        with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError, RecursionError):
            line = json.loads(row)
            if line.pop("sha256", None) is not None:
                rows[number] = lines_bytes([line]).rstrip(b"\n")
    file.write_bytes(b"\n".join(rows))


def _reseal(path: Path, change: Change) -> None:
    with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError, RecursionError):
        values = json.loads(path.read_bytes())
        if values.pop("sha256", None) is not None:
            change(values)
            path.write_bytes(json_bytes(sealed(values)))


def _vouch(values: dict[str, Any], file: Path) -> None:
    values["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
