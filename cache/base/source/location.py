"""Find a base: hub id, folder or .gguf file."""

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carryon.cache.base.source.gguf_header import check_gguf
from carryon.cache.base.source.hub import is_hub_reachable
from carryon.cache.errors import InputError, MissingError
from carryon.cache.optional import require

_READ_WHOLE = (".json", ".jinja", ".txt", ".model")
_MAX_DOCUMENT_BYTES = 96 << 20
"""Twice the largest tokenizers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseSource:
    """Where transformers finds a base."""

    name: str
    """Hub id, or absolute path of a folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub. None: the newest."""
    gguf_file: str | None = None
    """File in that folder, or None for a base in transformers' own format."""
    trusts_code: bool = False
    """Whether Python code that comes with it may run."""
    is_cached_only: bool = False
    """Whether the hub does not answer, so that only earlier downloads are looked at."""

    @property
    def is_local(self) -> bool:
        """Whether it is a folder or file of this machine."""
        return Path(self.name).is_absolute()

    @property
    def id(self) -> str:
        """Hub id, or absolute path of the folder or file."""
        return self.name if self.gguf_file is None else str(Path(self.name, self.gguf_file))

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of every from_pretrained that may find code."""
        return {"trust_remote_code": self.trusts_code, **self.place()}

    def place(self) -> dict[str, Any]:
        """Return the keyword arguments that say where a base is."""
        values: dict[str, Any] = {"revision": self.revision, "gguf_file": self.gguf_file}
        values |= {"local_files_only": self.is_cached_only or None}
        return {key: value for key, value in values.items() if value is not None}


def locate_base(source: str, *, trusts_code: bool = False) -> BaseSource:
    """Return where the base `source` (hub id, folder or .gguf file) lies; nothing is loaded.

    The hub is asked once for each id whether it answers.
    `trusts_code` is whether Python code that comes with it may run.

    Raises:
        MissingError: it can only be a path, and the path does not exist.
        InputError: the path is neither a folder saved by transformers nor a sound .gguf file.
        MissingExtraError: a .gguf file without the package gguf.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"base {source}: expected a folder or a .gguf file, got another file")
        require("gguf", extra="gguf", purpose=f"base {source}")
        check_gguf(path)
        return BaseSource(name=str(path.absolute().parent), gguf_file=path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(
                f"base {source}: expected a folder saved by transformers, but it has no "
                "config.json; give the folder of a model, or the .gguf file itself"
            )
        _refuse_odd_files(path)
        return BaseSource(name=str(path.absolute()), trusts_code=trusts_code)
    looks_like_path = path.is_absolute() or source.startswith(".") or source.count("/") > 1
    if looks_like_path or path.suffix == ".gguf" or not source:
        raise MissingError(
            f"base {source!r}: no such folder or file; give a folder saved by transformers, "
            "a .gguf file or the id of a model on the hub"
        )
    name, _, revision = source.partition("@")
    return BaseSource(
        name=name,
        revision=revision or None,
        trusts_code=trusts_code,
        is_cached_only=not is_hub_reachable(name, revision or None),
    )


def _refuse_odd_files(folder: Path) -> None:
    """Refuse what transformers would read for ever, or into more memory than there is.

    Raises:
        InputError: a document of a base is a device, pipe or dead link, or is very large.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix not in _READ_WHOLE and path.suffix != ".safetensors":
            continue
        try:
            facts = path.stat()  # links are followed: the hub's cache is made of them
        except OSError as error:
            raise InputError(f"base {path}: expected a file: {error.strerror}") from error
        if not stat.S_ISREG(facts.st_mode):
            raise InputError(f"base {path}: expected a file, got a folder, pipe or device")
        if path.suffix in _READ_WHOLE and facts.st_size > _MAX_DOCUMENT_BYTES:
            raise InputError(
                f"base {path}: expected at most {_MAX_DOCUMENT_BYTES:,} bytes, got "
                f"{facts.st_size:,}"
            )
