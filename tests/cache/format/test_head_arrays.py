"""A memory-mapped head equals the stored one."""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_stores import flip_byte, make_given, plan_given, small_pieces

from carryon.cache.errors import DamagedStoreError, DiskFullError
from carryon.cache.format.head_arrays import map_head, read_head
from carryon.cache.format.manifest import Manifest


@pytest.fixture(autouse=True)
def several_chunks() -> Iterator[None]:
    """A head of 256 rows in four chunks."""
    with small_pieces():
        yield


def _store(root: Path, *, bias: bool = False, **head: Any) -> tuple[Path, Manifest]:  # noqa: ANN401
    given = make_given(**head)
    if bias:
        values = np.linspace(-1, 1, given.head.vocab_size, dtype=np.float32)
        given = replace(given, head=replace(given.head, bias=values))
    return root, plan_given(root, given)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "logit_scale"), [(None, 1.0), (5.0, 0.5)])
def test_a_mapped_head_equals_the_stored_one(
    tmp_path: Path, bias: bool, softcap: float | None, logit_scale: float
) -> None:
    root, manifest = _store(tmp_path, bias=bias, softcap=softcap, logit_scale=logit_scale)

    mapped, read = map_head(root, manifest), read_head(root, manifest)

    assert isinstance(mapped.weight, np.memmap)
    assert mapped.weight.dtype == read.weight.dtype
    np.testing.assert_array_equal(mapped.weight, read.weight)
    assert (mapped.bias is not None, read.bias is not None) == (bias, bias)
    np.testing.assert_array_equal(mapped.bias, read.bias)  # type: ignore[arg-type]
    assert (mapped.softcap, mapped.logit_scale) == (softcap, logit_scale)
    np.testing.assert_array_equal(mapped.norm.weight, read.norm.weight)


def test_a_mapped_head_leaves_no_file_in_the_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, manifest = _store(tmp_path / "store")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))

    head = map_head(root, manifest)

    assert list((tmp_path / "scratch").iterdir()) == []
    assert head.weight.any()


def test_changing_a_mapped_head_changes_neither_store_nor_other_maps(tmp_path: Path) -> None:
    root, manifest = _store(tmp_path)
    head = map_head(root, manifest)
    before = head.weight.copy()

    head.weight[0] += 1

    np.testing.assert_array_equal(read_head(root, manifest).weight, before)
    np.testing.assert_array_equal(map_head(root, manifest).weight, before)


def test_a_damaged_head_is_not_mapped(tmp_path: Path) -> None:
    root, manifest = _store(tmp_path)
    *_, last = sorted(path for path in (root / "head/lm_head/c").rglob("*") if path.is_file())
    flip_byte(last, last.stat().st_size // 2)

    with pytest.raises(DamagedStoreError, match="head/lm_head"):
        map_head(root, manifest)


def test_a_full_disk_is_named_when_a_head_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, manifest = _store(tmp_path)
    full = Path("/dev/full")  # every write to it fails as on a full disk
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda prefix: full.open("wb", buffering=0))

    with pytest.raises(DiskFullError, match=tempfile.gettempdir()):
        map_head(root, manifest)
