"""Python code that comes with a base. It runs only where the user says so, by its digest.

transformers runs files beside the config that `auto_map` names, and custom_generate/generate.py.
Their digest is recorded with the base, and compared before any of them runs again.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from carryon.cache.base.source.location import BaseSource
from carryon.cache.errors import InputError, MissingError, SettingMismatchError
from carryon.cache.files.documents import parse_json, read_bounded

_CONFIGS = ("config.json", "tokenizer_config.json")
_MAX_BYTES = 96 << 20
_BESIDE = re.compile(r"\w+\.\w+")
"""Module and class of code beside the config: no path, no other repository."""
_FIX = "read its Python files, then --trust-remote-code if you trust them"


def digest_code(source: BaseSource) -> str | None:
    """Return the SHA-256 (hex) of the code of a base that would run; None for none.

    Nothing is run.

    Raises:
        InputError: a config is no JSON, or names code elsewhere or other configs.
        MissingError: it is not on the hub, or the hub cannot be reached.
    """
    if source.gguf_file is not None:
        return None
    folder = _folder(source)
    configs = [_config(folder / name, source) for name in _CONFIGS]
    if any("configuration_files" in config for config in configs):
        raise InputError(
            f"base {source.name}: expected code that config.json names, got a config that names "
            "other configs, which could name other code. Fix: take configuration_files out of it"
        )
    names = [name for config in configs for name in _names(config.get("auto_map"))]
    if elsewhere := [name for name in names if not _BESIDE.fullmatch(name)]:
        raise InputError(
            f"base {source.name}: expected code of its own repository, beside the config, got "
            f"{elsewhere[0]!a:.80}, which could change. Fix: copy that code beside the config"
        )
    own = sorted(folder.glob("custom_generate/*.py"))
    if not names and not own:
        return None
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*.py")), *own]:
        content = _read(path, source)
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def refuse_other_code(
    expected: Mapping[str, Any], code_sha256: str | None, *, trusts: bool, where: str
) -> None:
    """Compare the code of a base with the recorded one, before it runs.

    Args:
        expected: identity that a store or carry-on records.
        code_sha256: of the code that would run.
        trusts: whether the user allows it.
        where: the base, for errors.

    Raises:
        InputError: code is recorded and not allowed.
        SettingMismatchError: it is other code.
    """
    recorded = expected.get("code_sha256")
    if recorded and not trusts:
        raise InputError(
            f"{where}: expected leave to run the code that comes with it ({str(recorded)[:12]}), "
            f"with which its states were made. Fix: {_FIX}"
        )
    if recorded != code_sha256:
        got, known = str(code_sha256 or "none")[:12], str(recorded or "none")[:12]
        fix = "leave out --trust-remote-code" if not recorded else "give the right base with --base"
        raise SettingMismatchError(
            f"{where}: expected the recorded code ({known}), got {got}, which was not run. "
            f"Fix: {fix}"
        )


def _folder(source: BaseSource) -> Path:
    if source.is_local:
        return Path(source.name)
    try:
        return Path(
            snapshot_download(source.name, allow_patterns=["*.py", *_CONFIGS], **source.place())
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:300]
        raise MissingError(
            f"base {source.name}: its code could not be fetched from the hub: {reason}"
        ) from error


def _config(path: Path, source: BaseSource) -> dict[str, Any]:
    """Return a config as it is in its file; empty where there is none."""
    if not path.exists():
        return {}
    try:
        document = parse_json(_read(path, source))
    except ValueError as error:
        raise InputError(f"base {source.name}: {path.name}: expected JSON: {error}") from error
    return document if isinstance(document, dict) else {}


def _names(auto_map: object) -> Iterator[str]:
    """Yield what an `auto_map` names: texts, or lists of them (of slow and fast tokenizers)."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for each in values:
        for name in each if isinstance(each, list) else [each]:
            if name is not None:
                yield str(name)


def _read(path: Path, source: BaseSource) -> bytes:
    try:
        return read_bounded(path.resolve(), max_bytes=_MAX_BYTES)  # the hub's cache has links
    except (OSError, RuntimeError) as error:  # the latter of a loop of links
        raise InputError(f"base {source.name}: {path.name}: {error}") from error
