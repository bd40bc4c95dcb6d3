"""Documents of arrays: the same bytes as in every store, made by zarr-python."""

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from carryon.cache.errors import InputError
from carryon.cache.files.documents import json_bytes
from carryon.cache.format.zarr_metadata import array_document, chunk_rows

BEFORE = Path(__file__).parents[2] / "data" / "before.tar.xz"
STORES = ("./store/", "./store-near/")


def test_documents_are_the_bytes_of_stores_from_before() -> None:
    seen = set()
    with tarfile.open(BEFORE) as archive:
        for member in archive:
            if not (member.name.startswith(STORES) and member.name.endswith("zarr.json")):
                continue
            content = archive.extractfile(member).read()  # type: ignore[union-attr]
            document = json.loads(content)
            if document["node_type"] == "array":
                assert json_bytes(remade(document)) == content, member.name
                seen.add((document["data_type"], len(document["codecs"]) == 1))
    assert {("uint16", True), ("uint8", False), ("float32", False), ("int64", False)} <= seen


def remade(document: dict[str, Any]) -> dict[str, Any]:
    grid = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
    is_sharded = document["codecs"][0]["name"] == "sharding_indexed"
    inner = document["codecs"][0]["configuration"]["chunk_shape"] if is_sharded else grid
    return array_document(
        shape=tuple(document["shape"]),
        chunk=tuple(inner),
        shard=grid if is_sharded else None,
        dtype=document["data_type"],
        attributes=document["attributes"],
    )


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "int32", "int64"])
def test_zarr_python_writes_by_a_document_and_reads_it_back(tmp_path: Path, dtype: str) -> None:
    document = array_document(shape=(10, 3), chunk=(2, 3), shard=(4, 3), dtype=dtype)
    (tmp_path / "zarr.json").write_bytes(json_bytes(document))
    values = np.arange(30).reshape(10, 3).astype(dtype)
    zarr.open_array(tmp_path, mode="r+")[:] = values
    np.testing.assert_array_equal(zarr.open_array(tmp_path, mode="r")[:], values)  # type: ignore[arg-type]


def test_chunks_divide_a_unit_and_are_not_tiny() -> None:
    assert chunk_rows(row_bytes=1152, unit_tokens=32768) == 4096
    assert chunk_rows(row_bytes=16 << 20, unit_tokens=32) == 1
    with pytest.raises(InputError, match="expected a multiple of a number near 4551, got 32749"):
        chunk_rows(row_bytes=1152, unit_tokens=32749)  # a prime
