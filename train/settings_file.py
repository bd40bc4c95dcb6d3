"""The settings of a run or a lineage as YAML, whose first line is a comment with their SHA-256."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import read_bounded
from carryon.train.config import TrainSettings, with_current_names

_MARK = b"# sha256: "
_MAX_BYTES = 1 << 15
"""Ten times what is written; YAML is read slowly."""
_OTHER_NAMES = {"store", "out", "alpha"}


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings atomically, for --config to read."""
    text = yaml.safe_dump(dict(settings), sort_keys=False).encode()
    write_file(path, _first_line(text) + text)


def check_settings(path: Path) -> dict[str, Any]:
    """Return settings under today's names, compared with their digest; older files have none.

    Raises:
        InputError: they are not as they were written.
        ValueError, yaml.YAMLError: they are no YAML.
    """
    content = read_bounded(path, max_bytes=_MAX_BYTES)
    values = yaml.safe_load(content)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected settings by name, got something else")
    first, _, text = content.partition(b"\n")
    if first.startswith(b"#") and first + b"\n" != _first_line(text):
        raise InputError(f"{path}: the settings differ from the SHA-256 in its first line")
    settings = with_current_names({str(name): value for name, value in values.items()})
    if unknown := settings.keys() - TrainSettings().to_flat().keys() - _OTHER_NAMES:
        raise InputError(f"{path}: expected names of settings, got {min(unknown)!a:.80}")
    return settings


def _first_line(text: bytes) -> bytes:
    return _MARK + hashlib.sha256(text).hexdigest().encode() + b"\n"
