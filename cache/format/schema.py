"""Limits of what a manifest and a receipt may say, checked once, when the document is read.

A store may come from a stranger, who can make any digest valid. So a document is taken only if
every value has its type and lies within a limit, and if every path in it is one that a store's
layout has: relative, in normal form, without links to anywhere else. Code that uses a `Manifest`
or a `Receipt` relies on it. The limits are far above what honest stores reach.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from carryon.cache.format.quantization import STATE_TYPES, STEPS
from carryon.cache.format.zarr_metadata import (
    ALIGNED_ARRAYS,
    ROW_ARRAYS,
    channel_scale_path,
    row_path,
    shard_path,
    token_scale_path,
)

MAX_CHUNK_BYTES = 256 << 20
"""Of a chunk in memory: most are below 5 MB; 65,536 ids of 4,096 bytes."""
MAX_DOCUMENT_BYTES = 1 << 20
"""Of the zarr.json of a group or array, and of the config of blocks."""
MAX_RECEIPT_BYTES = 8 << 20
_MAX_RATIO = 1 << 15
"""zstd stores at most 128 kB of equal bytes in 4: a smaller file cannot hold what it should."""
_MAX_UNIT_BYTES = 64 << 30
_MAX_BLOCK_BYTES = 64 << 30
_MAX_LINES_BYTES = 1 << 30
_MAX_UNITS = 1 << 22
_MAX_SAMPLES = 1 << 32
_MAX_RULES = 1 << 16
_MAX_PARTS = 1 << 16
_MAX_WIDTH = 1 << 17
_MAX_VOCABULARY = 1 << 24
_MAX_LAYERS = 10_000
_MAX_UNIT_TOKENS = 1 << 24
_MAX_TAPS = 256
_MAX_TEXT = 1 << 16
_MAX_ERROR = 1.0
"""Of a lossy profile, relative to the states; honest ones are below 0.1. It widens the tolerance of
the probe."""
_MAX_NATS = 1e4
FRAME_BYTES = 64
"""Of Blosc's header, the checksum and the entry in an index, for each chunk, rounded up."""

_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_TAP = r"(?:final|prenorm|layer\.(?:0|[1-9][0-9]{0,3}))"
_STORED = rf"(?:stable|{_TAP})"
"""`stable` is written beside `final` in aligned stores only; nobody asks for it by name."""
_ARRAYS = (
    "units|samples/(?:start|length|id|held_out|group|role)"
    "|head/(?:lm_head|norm_weight|norm_bias|bias)"
    rf"|probe/(?:rows|top_ids|top_logits|states/{_STORED})"
    rf"|aligned/(?:{'|'.join(ALIGNED_ARRAYS)})"
)
_PLANNED = re.compile(
    "(?:hidden|samples|head|probe|probe/states|scale|scale/token|scale/channel|aligned"
    rf"|{'|'.join(ROW_ARRAYS)}|(?:hidden|scale/token|scale/channel)/{_STORED})/zarr[.]json"
    rf"|(?:{_ARRAYS})/(?:zarr[.]json|c/{_NUMBER}(?:/0)?)"
    rf"|blocks/(?:config[.]json|norm[.]safetensors|{_NUMBER}[.]safetensors)"
    "|skipped[.]jsonl"
)
_HEX = re.compile("[0-9a-f]+")


def is_tap(name: object) -> bool:
    """Tell whether this names a tap: `final`, `prenorm` or `layer.K`."""
    return isinstance(name, str) and re.fullmatch(_TAP, name) is not None


def is_planned(path: object) -> bool:
    """Tell whether planning a store can write a file at this path, relative to the store."""
    return isinstance(path, str) and _PLANNED.fullmatch(path) is not None


def max_planned_bytes(path: str) -> int:
    """Return the most bytes that a file of a plan can have."""
    if path.endswith("/zarr.json") or path == "blocks/config.json":
        return MAX_DOCUMENT_BYTES
    if path.startswith("blocks/"):
        return _MAX_BLOCK_BYTES
    return _MAX_LINES_BYTES if path == "skipped.jsonl" else MAX_CHUNK_BYTES + FRAME_BYTES


def check_manifest(values: Mapping[str, Any]) -> None:
    """Check the values of a manifest's document, without its digests.

    Raises:
        KeyError, TypeError, ValueError: names the value that is wrong.
    """
    settings = _mapping(values, "settings")
    taps = settings["taps"]
    if not isinstance(taps, list) or not all(map(is_tap, taps)) or len(set(taps)) < len(taps):
        raise ValueError(f"taps: expected different final, prenorm, layer.K, got {_shown(taps)}")
    if not 1 <= len(taps) <= _MAX_TAPS:
        raise ValueError(f"taps: expected 1 to {_MAX_TAPS}, got {len(taps)}")
    _choice(settings, "profile", ("exact", "raw", *STEPS))
    _choice(settings, "dtype", STATE_TYPES)
    if settings["profile"] in STEPS:
        _choice(settings, "dtype", ("bfloat16",))
    if "rounded_as" in settings:
        _choice(settings, "profile", ("raw",))
        _choice(settings, "rounded_as", STEPS)
        _choice(settings, "dtype", ("bfloat16",))
    unit_tokens = _whole(settings, "unit_tokens", 1, _MAX_UNIT_TOKENS)
    _whole({"seed": 0, **settings}, "seed", 0, 1 << 64)
    _whole({"with_blocks": 0, **settings}, "with_blocks", 0, 1 << 16)
    width = _whole(values, "width", 1, _MAX_WIDTH)
    rows = _whole(values, "rows_per_chunk", 1, unit_tokens)
    if unit_tokens % rows:
        raise ValueError(f"rows_per_chunk: expected a divisor of {unit_tokens}, got {rows}")
    row_bytes = width * STATE_TYPES[settings["dtype"]].itemsize
    for what, size, most in (
        ("chunk", rows * row_bytes, MAX_CHUNK_BYTES),
        ("unit", unit_tokens * row_bytes, _MAX_UNIT_BYTES),
    ):
        if size > most:
            raise ValueError(f"bytes of a {what}: expected at most {most}, got {size}")
    _check_base(values)
    _check_head(_mapping(values, "head"))
    _check_parts(values["parts"], unit_tokens)
    for tap, errors in _mapping(values, "profile_error").items():
        if not is_tap(tap) and tap != "stable":
            raise ValueError(f"profile_error: expected taps, got {_shown(tap)}")
        for name in _mapping({tap: errors}, tap):
            is_ratio = name.endswith("relative_error")
            _number(errors, name, -_MAX_NATS, _MAX_ERROR if is_ratio else _MAX_NATS)
    if "alignment" in values:
        _check_alignment(_mapping(values, "alignment"))
    _check_files(_mapping(values, "files"))


def _check_base(values: Mapping[str, Any]) -> None:
    base, forward = _mapping(values, "base"), _mapping(values, "forward")
    _text(base, "id")
    if "num_layers" in base:
        _whole(base, "num_layers", 1, _MAX_LAYERS)
    for name, value in base.items():
        if value is not None and not isinstance(value, int):
            _text(base, name)
    for texts in (forward, _mapping(values, "versions")):
        for name in texts:
            _text(texts, name)
    _mapping(values, "corpus")


def _check_alignment(facts: Mapping[str, Any]) -> None:
    for name in ("anchor", "digest", "tokenizer_sha256", "anchor_tokenizer_sha256"):
        if not _is_sha256(facts[name]):
            raise ValueError(f"alignment: {name}: expected a SHA-256, got {_shown(facts[name])}")
    if not _is_sha256(facts.get("text_sha256", facts["digest"])):  # not in older stores
        got = _shown(facts["text_sha256"])
        raise ValueError(f"alignment: text_sha256: expected a SHA-256, got {got}")
    _text(facts, "anchor_base")
    _whole(facts, "anchor_vocab_size", 1, _MAX_VOCABULARY)
    _whole(facts, "unit_nodes", 1, _MAX_UNIT_TOKENS * 16)
    _whole(facts, "missing_samples", 0, _MAX_SAMPLES)
    if "rules" in facts:  # not in older stores
        _whole(facts, "rules", 1, _MAX_RULES)


def _check_head(head: Mapping[str, Any]) -> None:
    _whole(head, "vocab_size", 1, _MAX_VOCABULARY)
    _choice(head, "norm_kind", ("rms", "layer"))
    for name in ("has_bias", "has_norm_bias"):
        _choice(head, name, (False, True))
    _number(head, "logit_scale", -1e6, 1e6)
    _number(head, "norm_eps", 0, 1e6)
    _number(head, "norm_weight_offset", -1e6, 1e6)
    if head["softcap"] is not None:
        _number(head, "softcap", 1e-6, 1e9)


def _check_parts(parts: object, unit_tokens: int) -> None:
    if not isinstance(parts, list) or not 1 <= len(parts) <= _MAX_PARTS:
        raise ValueError(f"parts: expected 1 to {_MAX_PARTS}, got {_shown(parts)}")
    num_units = num_samples = 0
    for part in parts:
        if not isinstance(part, Mapping):
            raise TypeError(f"parts: expected objects, got {_shown(part)}")
        _whole(part, "first_unit", num_units, num_units)
        _whole(part, "first_sample", num_samples, num_samples)
        added = _whole(part, "num_units", 0, _MAX_UNITS - num_units)
        num_units += added
        num_samples += _whole(part, "num_samples", 0, _MAX_SAMPLES - num_samples)
        tokens = _whole(_mapping(part, "counts"), "tokens", 0, added * unit_tokens)
        _whole(part["counts"], "supervised_tokens", 0, tokens)
        if not isinstance(part["files"], list):
            raise TypeError(f"files: expected a list, got {_shown(part['files'])}")
        for file in part["files"]:
            if not isinstance(file, Mapping):
                raise TypeError(f"files: expected objects, got {_shown(file)}")
            _text(file, "name")
            _text(file, "sha256")


def _check_files(files: Mapping[str, Any]) -> None:
    for path, digests in files.items():
        if not is_planned(path):
            raise ValueError(f"files: expected names of files of a store, got {_shown(path)}")
        if not isinstance(digests, list) or not digests or not all(map(_is_sha256, digests)):
            raise ValueError(f"files: {path}: expected SHA-256 digests, got {_shown(digests)}")


def check_receipt(
    values: Mapping[str, Any],
    *,
    unit: int,
    taps: list[str],
    unit_tokens: int,
    rows_per_chunk: int,
    row_bytes: int,
    is_lossy: bool,
) -> None:
    """Check the values of the receipt of a unit, without its digest.

    Args:
        values: of the document.
        unit: whose receipt it should be.
        taps: of the store.
        unit_tokens: rows of a unit.
        rows_per_chunk: rows of a chunk of states.
        row_bytes: bytes of a row of states.
        is_lossy: whether the unit has scales beside its states.

    Raises:
        KeyError, TypeError, ValueError: names the value that is wrong.
    """
    num_chunks = unit_tokens // rows_per_chunk
    shard_bytes = unit_tokens * row_bytes + (num_chunks + 1) * FRAME_BYTES
    limits = {row_path(name, unit): 4 * unit_tokens + FRAME_BYTES for name in ROW_ARRAYS}
    shards = {shard_path(tap, unit) for tap in taps}
    limits |= dict.fromkeys(shards, shard_bytes)
    if is_lossy:
        limits |= {token_scale_path(tap, unit): 4 * unit_tokens + FRAME_BYTES for tap in taps}
        limits |= {channel_scale_path(tap, unit): 4 * row_bytes + FRAME_BYTES for tap in taps}
    _whole(values, "unit", 0, _MAX_UNITS)
    _whole(values, "num_tokens", 0, unit_tokens)
    for name in ("origin_sha256", "input_sha256"):
        if not _is_sha256(values[name]):
            raise ValueError(f"{name}: expected a SHA-256, got {_shown(values[name])}")
    _number(values, "elapsed_s", -1e12, 1e12)
    versions = _mapping(values, "versions")
    for name in versions:
        _text(versions, name)
    files = _mapping(values, "files")
    if values["unit"] == unit and set(files) != set(limits):
        raise ValueError(f"files: expected {sorted(limits)}, got {_shown(sorted(files))}")
    for path, entry in files.items():
        if not isinstance(entry, Mapping):
            raise TypeError(f"{path:.80}: expected an object, got {_shown(entry)}")
        least = -(-unit_tokens * row_bytes // _MAX_RATIO) if path in shards else 0
        _whole(entry, "bytes", least, limits.get(path, shard_bytes))
        chunks = entry["chunks"]
        if not _is_sha256(entry["sha256"]) or not isinstance(chunks, list):
            raise ValueError(f"{path:.80}: expected a SHA-256 and checksums, got {_shown(entry)}")
        if path in shards and len(chunks) != num_chunks:
            raise ValueError(f"{path}: expected {num_chunks} checksums, got {len(chunks)}")
        if not all(_is_hex(chunk, 8) for chunk in chunks):
            raise ValueError(f"{path:.80}: expected checksums, got {_shown(chunks)}")


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values[name]
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected an object, got {_shown(value)}")
    return value


def _whole(values: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = values[name]
    if type(value) is not int:  # a bool is an int
        raise TypeError(f"{name}: expected int, got {_shown(value)}")
    if not least <= value <= most:
        expected = f"{least} to {most}" if least < most else str(least)
        raise ValueError(f"{name}: expected {expected}, got {_shown(value)}")
    return value


def _number(values: Mapping[str, Any], name: str, least: float, most: float) -> None:
    value = values[name]
    if type(value) not in (int, float) or not least <= value <= most or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number from {least} to {most}, got {_shown(value)}")


def _text(values: Mapping[str, Any], name: str) -> None:
    value = values[name]
    if not isinstance(value, str) or not value or len(value) > _MAX_TEXT or "\0" in value:
        raise TypeError(f"{name:.80}: expected a text, got {_shown(value)}")


def _choice(values: Mapping[str, Any], name: str, choices: Any) -> None:  # noqa: ANN401
    value = values[name]
    if not isinstance(value, str | bool) or value not in choices:
        listed = ", ".join(map(str, choices))
        raise ValueError(f"{name}: expected one of {listed}, got {_shown(value)}")


def _is_sha256(value: object) -> bool:
    return _is_hex(value, 64)


def _is_hex(value: object, length: int) -> bool:
    return isinstance(value, str) and len(value) == length and _HEX.fullmatch(value) is not None


def _shown(value: object) -> str:
    """Return the beginning of a value, in one line of ASCII."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # an int of too many digits
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
