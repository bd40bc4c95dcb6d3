"""Projections kept on disk, each under the digest of all that it was computed from.

A projection depends on nothing that is trained, so one run computes it and others read it.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from carryon.cache.errors import DamagedFileError
from carryon.train.mixing.projection import FEATURES, ProjectedTargets
from carryon.train.mixing.tensor_cache import cached_tensors
from carryon.train.mixing.vocabulary_map import RULE_VERSION

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
    num_positions = key["positions"]
    return cached_tensors(
        "projection",
        key,
        compute,
        max_bytes=4 * num_positions * (1 + len(FEATURES)),
        pack=lambda made: {"log_probs": made.log_probs, "features": made.features},
        check=lambda tensors, path: _checked(tensors, num_positions=num_positions, path=path),
    )


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
