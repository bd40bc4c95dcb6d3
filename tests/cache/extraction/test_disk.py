"""A full disk, and the disk limit that a user sets."""

from pathlib import Path

import pytest
from support.small_disks import PAGE, pages_used, resize
from support.tiny_stores import (
    error_of,
    extract_tiny,
    files_below,
    planned_bytes,
    readable_content,
    receipts_in,
)

from carryon.cache.base.model import Base
from carryon.cache.errors import DiskFullError, InputError, UnfinishedStoreError
from carryon.cache.extraction.stages.items import largest_unit_bytes
from carryon.cache.format.manifest import read_manifest
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify


def test_a_full_disk_stops_cleanly_and_the_same_call_resumes(
    small_disk: Path, tiny_base: Base, store_data: Path, store_original: Path
) -> None:
    expected = readable_content(store_original)
    root = small_disk / "store"
    num_full = 0
    for pages in range(1, 200, 12):  # into the plan, later into the units
        resize(small_disk, (pages + pages_used(small_disk)) * PAGE)
        before = receipts_in(root)
        error = error_of(lambda: extract_tiny(tiny_base, store_data, root))
        if not error:
            break
        num_full += 1
        assert error.startswith("DiskFullError")
        assert f"the disk is full while writing {root}" in error
        assert "free some space and run the same command again" in error
        assert not [path for path in files_below(root) if ".partial" in path]
        after = receipts_in(root)
        assert {name: after[name] for name in before} == before
        finished_units_are_readable(root)
    assert num_full >= 3
    assert readable_content(root) == expected
    assert verify(root, depth="full").is_complete


def finished_units_are_readable(root: Path) -> None:
    error = error_of(lambda: read_manifest(root))
    if error:  # it became full before there was a manifest, or between it and its copy
        assert "expected a store" in error or "its copy is there" in error
        return
    store = Store.open(root, allow_unfinished=True)
    assert len(list(store.iter_units())) < store.num_units
    assert verify(root, depth="full").is_sound


def test_a_disk_that_is_full_before_the_lock_is_named_too(
    small_disk: Path, tiny_base: Base, store_data: Path
) -> None:
    (small_disk / "other").write_bytes(bytes(8 * PAGE))
    resize(small_disk, 8 * PAGE)
    with pytest.raises(DiskFullError, match=r"full while writing .*units/\.lock"):
        extract_tiny(tiny_base, store_data, small_disk / "store")


def test_a_limit_stops_before_the_store_is_larger_and_more_room_resumes(
    tiny_base: Base, store_data: Path, store_original: Path, store_tmp: Path
) -> None:
    expected = readable_content(store_original)
    root = store_tmp / "store"
    planned = planned_bytes(store_original)
    assert extract_tiny(tiny_base, store_data, root, max_disk_bytes=planned).computed_units == 0
    assert bytes_below(root) <= planned
    manifest = read_manifest(root)
    step = largest_unit_bytes(manifest, manifest.unit_tokens)
    limit, num_calls, is_finished = bytes_below(root), 0, False
    while not is_finished:
        limit += step // 2
        before = receipts_in(root)
        report = extract_tiny(tiny_base, store_data, root, max_disk_bytes=limit)
        is_finished, num_calls = report.is_finished, num_calls + 1
        assert bytes_below(root) <= limit
        after = receipts_in(root)
        assert {name: after[name] for name in before} == before
        assert len(after) == len(before) + report.computed_units
        if not is_finished:
            with pytest.raises(UnfinishedStoreError, match="units are not extracted"):
                Store.open(root)
            store = Store.open(root, allow_unfinished=True)
            for unit in store.iter_units():
                assert unit.hidden["final"].tobytes() == expected[f"{unit.unit}/final"]
            assert verify(root, depth="full").is_sound
    assert num_calls >= 3
    assert readable_content(root) == expected


def test_a_limit_below_the_plan_is_refused_before_anything_is_written(
    tiny_base: Base, store_data: Path, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    with pytest.raises(InputError, match="max_disk: expected more than .* MB, the size of"):
        extract_tiny(tiny_base, store_data, root, max_disk_bytes=100)
    assert bytes_below(root) == 0
    assert extract_tiny(tiny_base, store_data, root).is_finished


def test_a_limit_with_room_for_all_is_no_limit(
    tiny_base: Base, store_data: Path, store_tmp: Path
) -> None:
    report = extract_tiny(tiny_base, store_data, store_tmp / "store", max_disk_bytes=1 << 30)
    assert report.is_finished


def bytes_below(root: Path) -> int:
    return sum(map(len, files_below(root).values()))
