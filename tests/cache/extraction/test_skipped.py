"""Rows that were left out are listed in the store: written with the plan, verified, repaired."""

import json
from pathlib import Path

import pytest
from support.tiny_stores import extract_tiny, flip_byte, repair_tiny, write_corpus

from carryon.cache import verify
from carryon.cache.base.model import Base
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.zarr_metadata import SKIPPED_PATH, copy_path
from carryon.cache.settings import DataSettings
from carryon.cache.store.reader import Store

SKIP = DataSettings(tokenizer_workers=1, bad_rows="skip")


def with_bad_row(path: Path, *, first: int = 0) -> Path:
    write_corpus(path, num_samples=6, first=first)
    path.write_text(path.read_text() + "{not json}\n")
    return path


@pytest.fixture
def root(tiny_base: Base, store_tmp: Path) -> Path:
    data = with_bad_row(store_tmp / "data.jsonl")
    extract_tiny(tiny_base, data, store_tmp / "store", data_settings=SKIP)
    return store_tmp / "store"


def skipped_in(root: Path) -> list[str]:
    lines = (root / SKIPPED_PATH).read_text("ascii").splitlines()
    assert all(set(json.loads(line)) == {"where", "problem"} for line in lines)
    return [Path(json.loads(line)["where"]).name for line in lines]


def test_a_skipped_row_is_listed_with_its_place(root: Path) -> None:
    assert skipped_in(root) == ["data.jsonl:7"]
    [part] = read_manifest(root).parts
    [loss] = part.report["losses"]
    assert (loss["reason"], loss["records"]) == ("bad row", 1)
    assert Store.open(root).num_samples == 6
    assert verify(root, depth="full").is_complete


def test_a_store_without_skipped_rows_has_no_list(store_folder: Path) -> None:
    assert not (store_folder / SKIPPED_PATH).exists()


@pytest.mark.parametrize("path", [SKIPPED_PATH, copy_path(SKIPPED_PATH)])
def test_a_damaged_list_is_found_and_repaired(root: Path, tiny_base: Base, path: str) -> None:
    before = (root / path).read_bytes()
    flip_byte(root / path, 3)
    assert [problem.path for problem in verify(root).problems] == [path]
    assert repair_tiny(root, tiny_base).restored_files == [path]
    assert (root / path).read_bytes() == before


def test_appending_adds_lines(root: Path, tiny_base: Base, store_tmp: Path) -> None:
    good = write_corpus(store_tmp / "good.jsonl", num_samples=3, first=6)
    extract_tiny(tiny_base, good, root, append=True)
    assert skipped_in(root) == ["data.jsonl:7"]
    more = with_bad_row(store_tmp / "more.jsonl", first=9)
    extract_tiny(tiny_base, more, root, append=True, data_settings=SKIP)
    assert skipped_in(root) == ["data.jsonl:7", "more.jsonl:7"]
    assert verify(root, depth="full").is_complete


def test_appending_begins_a_list_where_there_was_none(
    store_folder: Path, tiny_base: Base, store_tmp: Path
) -> None:
    more = with_bad_row(store_tmp / "more.jsonl", first=12)
    extract_tiny(tiny_base, more, store_folder, append=True, data_settings=SKIP)
    assert skipped_in(store_folder) == ["more.jsonl:7"]
    assert verify(store_folder, depth="full").is_complete
