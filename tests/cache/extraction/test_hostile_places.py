"""A stranger's store whose samples lie where no plan puts them, every digest valid: one line."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.tiny_stores import SHARING, UNIT_TOKENS, error_of, extract_tiny

from carryon.cache.base.model import Base
from carryon.cache.extraction.sharing.workers import Sharing
from carryon.cache.format.arrays import array_info, encode_array, read_array
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.zarr_metadata import receipt_path
from carryon.tools.bench.trust.signing import replace_planned

Places = tuple[NDArray[np.int64], NDArray[np.int32]]


def _no_tokens(starts: NDArray[np.int64], lengths: NDArray[np.int32]) -> None:
    lengths[1] = 0


def _gap(starts: NDArray[np.int64], lengths: NDArray[np.int32]) -> None:
    lengths[np.flatnonzero(starts[1:] % UNIT_TOKENS)[0]] -= 1


def _late(starts: NDArray[np.int64], lengths: NDArray[np.int32]) -> None:
    starts[0] += 1
    lengths[0] -= 1


def _empty_unit(starts: NDArray[np.int64], lengths: NDArray[np.int32]) -> None:
    """All samples of the second unit lie at the end of the first."""
    own = (starts >= UNIT_TOKENS) & (starts < 2 * UNIT_TOKENS)
    first = np.flatnonzero(starts < UNIT_TOKENS)
    lengths[: own.sum() + len(first)] = 1
    starts[: own.sum() + len(first)] = np.arange(own.sum() + len(first))


@pytest.mark.parametrize("sharing", [None, SHARING])
@pytest.mark.parametrize("change", [_no_tokens, _gap, _late, _empty_unit])
def test_samples_that_no_plan_has_are_refused(
    tiny_base: Base,
    store_data: Path,
    store_original: Path,
    store_tmp: Path,
    change: Callable[[NDArray[np.int64], NDArray[np.int32]], None],
    sharing: Sharing | None,
) -> None:
    root = Path(shutil.copytree(store_original, store_tmp / "store"))
    manifest = read_manifest(root)
    tables: dict[str, NDArray[Any]] = {}
    for name in ("samples/start", "samples/length"):
        how = {"stop": manifest.num_samples, "digests": manifest.files}
        tables[name] = read_array(root, name, **how).copy()
    change(*tables.values())
    for name, values in tables.items():
        [rows] = array_info(root, name, digests=manifest.files).chunk
        for path, content in encode_array(name, values, rows_per_chunk=rows):
            replace_planned(root, path, content)
    for unit in range(manifest.num_units):
        (root / receipt_path(unit)).unlink()

    text = error_of(lambda: extract_tiny(tiny_base, store_data, root, sharing=sharing))

    assert "samples/start, samples/length: expected the samples of a unit one behind" in text
    assert "Fix: extract into another folder" in text
