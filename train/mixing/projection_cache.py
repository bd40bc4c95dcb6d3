"""Projections kept on disk, each under the digest of all that it was computed from.

A projection depends on nothing that is trained, so one run computes it and others read it. A file
that is not as it was written is computed again, with a warning.
"""

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carryon.cache.corpus.reading.cache_folder import cache_folder, writing_cache
from carryon.cache.errors import DamagedFileError, MissingError
from carryon.cache.files.atomic import recover_folder, whole_folder
from carryon.cache.files.documents import digest_of, read_sealed, sealed, write_json
from carryon.cache.files.regular import open_regular
from carryon.cache.files.tensor_files import digest_tensors
from carryon.train.mixing.projection import FEATURES, ProjectedTargets
from carryon.train.mixing.vocabulary_map import RULE_VERSION

logger = logging.getLogger(__name__)
_RECEIPT, _TENSORS = "projection.json", "projection.safetensors"
_MAX_HEADER_BYTES = 1 << 16
_ROUNDING = 1e-3
"""By which a log-probability in float32 may be above 0."""


def projection_key(
    *,
    anchor_fingerprint: str,
    source_fingerprint: str,
    map_digest: str,
    num_positions: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all that a projection is computed from, as JSON.

    Args:
        anchor_fingerprint: of the anchor's store.
        source_fingerprint: of the source's store.
        map_digest: of the map of their vocabularies.
        num_positions: that are projected.
        options: whatever else changes its numbers, such as how positions are aligned.
    """
    return {
        "anchor": anchor_fingerprint,
        "source": source_fingerprint,
        "map": map_digest,
        "positions": num_positions,
        "options": dict(options),
        "features": list(FEATURES),
        "rule": RULE_VERSION,
    }


def cached_projection(
    key: Mapping[str, Any], compute: Callable[[], ProjectedTargets]
) -> ProjectedTargets:
    """Return the projection of a key: as it was written, or computed now and written.

    Args:
        key: of `projection_key`.
        compute: computes it.

    Raises:
        DiskFullError: it cannot be written; nothing of it remains.
    """
    folder = cache_folder() / "projections" / digest_of(key)
    if (found := read_projection(folder, key)) is not None:
        return found
    projected = compute()
    with writing_cache(folder.parent):
        write_projection(folder, key, projected)
    return projected


def write_projection(folder: Path, key: Mapping[str, Any], projected: ProjectedTargets) -> None:
    """Write a projection atomically, with the digest of its numbers.

    Raises:
        DiskFullError: no space left; nothing of it remains.
        StoreBusyError: another process is writing it.
    """
    from safetensors.torch import save_file

    tensors = {"log_probs": projected.log_probs, "features": projected.features}
    with whole_folder(folder) as partial:
        save_file({name: each.contiguous() for name, each in tensors.items()}, partial / _TENSORS)
        digest = digest_tensors(partial / _TENSORS)
        write_json(partial / _RECEIPT, sealed({"key": dict(key), "files": {_TENSORS: digest}}))


def read_projection(folder: Path, key: Mapping[str, Any]) -> ProjectedTargets | None:
    """Return a projection whose every byte was compared; None if it is missing or damaged."""
    recover_folder(folder)
    if not folder.exists():
        return None
    try:
        return _read(folder, key)
    except (DamagedFileError, MissingError, OSError) as error:
        logger.warning("%s: the cached projection is computed again: %s", folder, error)
        return None


def _read(folder: Path, key: Mapping[str, Any]) -> ProjectedTargets:
    from safetensors import SafetensorError
    from safetensors.torch import load

    receipt = read_sealed(folder / _RECEIPT)
    if receipt.get("key") != dict(key):
        raise DamagedFileError(f"{folder}: expected the projection of its key, got another one")
    path = folder / _TENSORS
    _check_size(path, num_positions=key["positions"])
    if receipt.get("files") != {_TENSORS: digest_tensors(path)}:
        raise DamagedFileError(f"{path}: the content differs from its SHA-256: it was changed")
    try:
        tensors = load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:  # or a dtype that torch lacks
        raise DamagedFileError(f"{path}: expected tensors, got {error}") from error
    return _checked(tensors, num_positions=key["positions"], path=path)


def _check_size(path: Path, *, num_positions: int) -> None:
    most = _MAX_HEADER_BYTES + 4 * num_positions * (1 + len(FEATURES))
    with open_regular(path) as file:
        size = file.seek(0, 2)
    if size > most:
        raise DamagedFileError(f"{path}: expected at most {most:,} bytes, got {size:,}")


def _checked(tensors: Mapping[str, Tensor], *, num_positions: int, path: Path) -> ProjectedTargets:
    if set(tensors) != {"log_probs", "features"}:
        names = sorted(tensors)
        raise DamagedFileError(f"{path}: expected log_probs and features, got {names!a:.80}")
    shapes = {"log_probs": [num_positions], "features": [num_positions, len(FEATURES)]}
    for name, shape in shapes.items():
        each = tensors[name]
        if list(each.shape) != shape or each.dtype != torch.float32:
            raise DamagedFileError(f"{path}: expected {name} of shape {shape} in float32")
        if each.numel() and not all(map(math.isfinite, map(float, each.aminmax()))):
            raise DamagedFileError(f"{path}: expected finite {name}, got inf or NaN")
    if num_positions and float(tensors["log_probs"].max()) > _ROUNDING:
        raise DamagedFileError(f"{path}: expected log_probs of at most 0, got larger ones")
    return ProjectedTargets(log_probs=tensors["log_probs"], features=tensors["features"])
