"""Tensors kept in the cache, each folder under the digest of all that they were computed from.

A folder is written whole or not at all, and every byte is compared when it is read: with the digest
in its receipt, and then with what such tensors can be. What is not as it was written is computed
again, with a warning.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from carryon.cache.corpus.reading.cache_folder import cache_folder, writing_cache
from carryon.cache.errors import DamagedFileError, MissingError, StoreBusyError
from carryon.cache.files.atomic import recover_folder, whole_folder
from carryon.cache.files.documents import digest_of, read_sealed, sealed, write_json
from carryon.cache.files.regular import open_regular
from carryon.cache.files.tensor_files import digest_tensors

logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_HEADER_BYTES = 1 << 16


def cached_tensors(
    name: str,
    key: Mapping[str, Any],
    compute: Callable[[], T],
    *,
    max_bytes: int,
    pack: Callable[[T], Mapping[str, Tensor]],
    check: Callable[[Mapping[str, Tensor], Path], T],
) -> T:
    """Return what belongs to a key: as it was written, or computed now and written.

    Args:
        name: of the kind, such as `projection`.
        key: all that it is computed from, as JSON.
        compute: computes it.
        max_bytes: of its tensors.
        pack: gives its tensors.
        check: gives it back from tensors of a file, or raises DamagedFileError.

    Raises:
        DiskFullError: it cannot be written; nothing of it remains.
    """
    folder = folder_of(name, key)
    recover_folder(folder)
    if folder.exists():
        try:
            return check(_read(folder, name, key, max_bytes), folder / f"{name}.safetensors")
        except (DamagedFileError, MissingError, OSError) as error:
            logger.warning("%s: the cached %s is computed again: %s", folder, name, error)
    made = compute()
    try:
        with writing_cache(folder.parent):
            _write(folder, name, key, pack(made))
    except StoreBusyError:  # another process writes the same
        logger.info("%s: the %s is being cached by another process", folder, name)
    return made


def folder_of(name: str, key: Mapping[str, Any]) -> Path:
    """Return where the tensors of a key are kept."""
    kinds = {"vocabulary": "vocabularies"}
    return cache_folder() / kinds.get(name, f"{name}s") / digest_of(key)


def _write(folder: Path, name: str, key: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically, with their digest.

    Raises:
        DiskFullError: no space left; nothing of them remains.
        StoreBusyError: another process is writing them.
    """
    from safetensors.torch import save_file

    file = f"{name}.safetensors"
    with whole_folder(folder) as partial:
        save_file({each: tensor.contiguous() for each, tensor in tensors.items()}, partial / file)
        digest = digest_tensors(partial / file)
        write_json(partial / f"{name}.json", sealed({"key": dict(key), "files": {file: digest}}))


def _read(folder: Path, name: str, key: Mapping[str, Any], max_bytes: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    receipt = read_sealed(folder / f"{name}.json")
    if receipt.get("key") != dict(key):
        raise DamagedFileError(f"{folder}: expected the {name} of its key, got another one")
    path = folder / f"{name}.safetensors"
    with open_regular(path) as file:
        size = file.seek(0, 2)
    if size > MAX_HEADER_BYTES + max_bytes:
        raise DamagedFileError(
            f"{path}: expected at most {MAX_HEADER_BYTES + max_bytes:,} bytes, got {size:,}"
        )
    if receipt.get("files") != {path.name: digest_tensors(path)}:
        raise DamagedFileError(f"{path}: the content differs from its SHA-256: it was changed")
    try:
        return load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:  # or a dtype that torch lacks
        raise DamagedFileError(f"{path}: expected tensors, got {error}") from error
