"""Settings as YAML: a user's files, the presets, and those of a run or a lineage.

The last are written here; their first line is a comment with the SHA-256 of the others.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import read_bounded
from carryon.train.config import TrainSettings
from carryon.train.saved_settings import with_current_names

_MARK = b"# sha256: "
_MAX_BYTES = 1 << 17
"""Of what is written for a run, a thousand stores included. It is read at a second for 160 kB: the
loader in C is faster, but ends the process on deep nesting."""
MAX_YAML_BYTES = 1 << 20
"""Of a user's file of settings."""
_OTHER_NAMES = {"store", "out", "alpha"}


PRESETS = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}
"""Name -> file."""


def read_yaml(path: Path) -> Any:  # noqa: ANN401
    """Return what a YAML file of settings says.

    Raises:
        OSError: it cannot be read.
        InputError: it is larger than MAX_YAML_BYTES, or no YAML of a few levels.
    """
    with path.open("rb") as file:
        content = file.read(MAX_YAML_BYTES + 1)
    if len(content) > MAX_YAML_BYTES:
        raise InputError(f"{path}: expected at most {MAX_YAML_BYTES:,} bytes, got more")
    try:
        return yaml.safe_load(content.decode())
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path}: expected YAML: {' '.join(str(error).split()):.300}") from error


def read_preset(name: str) -> dict[str, Any]:
    """Return the settings of a preset by name."""
    preset: dict[str, Any] = yaml.safe_load(PRESETS[name].read_text(encoding="ascii"))
    return preset


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
