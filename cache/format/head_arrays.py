"""The frozen head in a store: its arrays under `head/`, its facts in the manifest."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import FinalNorm, Head
from carryon.cache.errors import DamagedStoreError
from carryon.cache.files.full_disk import disk_full_named
from carryon.cache.format.arrays import ArrayInfo, array_info, encode_array, read_array, read_rows
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.zarr_metadata import HEAD_CHUNK_BYTES


def encode_head(head: Head) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of each file of the head."""
    weight = head.weight
    rows = max(1, HEAD_CHUNK_BYTES // (weight.shape[1] * weight.itemsize))
    attributes = {"logical_dtype": "bfloat16"} if weight.dtype == np.uint16 else None
    yield from encode_array("head/lm_head", weight, rows_per_chunk=rows, attributes=attributes)
    vectors = {
        "norm_weight": head.norm.weight,
        "norm_bias": head.norm.bias,
        "bias": head.bias,
    }
    for name, values in vectors.items():
        if values is not None:
            yield from encode_array(f"head/{name}", values, rows_per_chunk=len(values))


def head_facts(head: Head) -> dict[str, Any]:
    """Return what the manifest says about the head: everything but its arrays."""
    return {
        "vocab_size": head.vocab_size,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        "has_bias": head.bias is not None,
        "norm_kind": head.norm.kind,
        "norm_eps": head.norm.eps,
        "norm_weight_offset": head.norm.weight_offset,
        "has_norm_bias": head.norm.bias is not None,
    }


def read_head(root: Path, manifest: Manifest, *, tokens: NDArray[np.int32] | None = None) -> Head:
    """Return the head of the store at `root`.

    Args:
        root: of the store.
        manifest: of the store.
        tokens: of any shape: only the rows of these tokens are read, and the head returned has
            one row for each, in their order. Default: the whole vocabulary.

    Raises:
        DamagedStoreError: a chunk is missing or is not the one that was written.
    """
    facts, digests = manifest.head, manifest.files
    infos = _checked_infos(root, manifest)
    weight = (
        read_array(root, "head/lm_head", digests=digests, info=infos["lm_head"])
        if tokens is None
        else read_rows(root, "head/lm_head", tokens.ravel(), digests=digests, info=infos["lm_head"])
    )
    bias = (
        read_array(root, "head/bias", digests=digests, info=infos["bias"])
        if facts["has_bias"]
        else None
    )
    return Head(
        weight=weight,
        bias=bias if bias is None or tokens is None else bias[tokens.ravel()],
        logit_scale=facts["logit_scale"],
        softcap=facts["softcap"],
        norm=FinalNorm(
            kind=facts["norm_kind"],
            eps=facts["norm_eps"],
            weight_offset=facts["norm_weight_offset"],
            weight=read_array(root, "head/norm_weight", digests=digests, info=infos["norm_weight"]),
            bias=(
                read_array(root, "head/norm_bias", digests=digests, info=infos["norm_bias"])
                if facts["has_norm_bias"]
                else None
            ),
        ),
    )


def _checked_infos(root: Path, manifest: Manifest) -> dict[str, ArrayInfo]:
    """Return the facts of the head's arrays, whose sizes are those of the manifest."""
    facts, width = manifest.head, manifest.width
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head": (facts["vocab_size"], width),
        "norm_weight": (width,),
    }
    if facts["has_bias"]:
        shapes["bias"] = (facts["vocab_size"],)
    if facts["has_norm_bias"]:
        shapes["norm_bias"] = (width,)
    infos = {name: array_info(root, f"head/{name}", digests=manifest.files) for name in shapes}
    for name, shape in shapes.items():
        if (found := infos[name].shape) != shape:
            raise DamagedStoreError(f"{root}: head/{name}: expected shape {shape}, got {found}")
    return infos


def map_head(root: Path, manifest: Manifest) -> Head:
    """Return the head of the store at `root` with its rows memory-mapped from a temporary file.

    The system fetches pages when they are read and drops them when it needs the memory. Reading
    chunks of the store instead would decode the whole head in every step. The file has no name,
    lies in the folder for temporary files (TMPDIR), which should be on a disk, and goes with the
    process.

    Raises:
        DamagedStoreError: a chunk is missing or is not the one that was written.
        DiskFullError: no space for the rows, as large as the head is uncompressed.
    """
    name, digests = "head/lm_head", manifest.files
    info = array_info(root, name, digests=digests)
    first_token = np.zeros(1, dtype=np.int32)
    rest = read_head(root, manifest, tokens=first_token)
    bias = read_array(root, "head/bias", digests=digests) if rest.bias is not None else None
    with tempfile.TemporaryFile(prefix="carryon-head-") as file:
        with disk_full_named(Path(tempfile.gettempdir())):
            for first in range(0, info.shape[0], info.chunk[0]):
                stop = min(first + info.chunk[0], info.shape[0])
                rows = read_array(root, name, digests=digests, first=first, stop=stop)
                file.write(rows.data.cast("B"))
            file.flush()
        weight = np.memmap(file, dtype=info.dtype, mode="c", shape=info.shape)
    return replace(rest, weight=weight, bias=bias)
