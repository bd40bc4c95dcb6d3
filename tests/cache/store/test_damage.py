"""Bytes changed anywhere in a store are detected, named, never returned as data, and repaired."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_stores import (
    SETTINGS,
    extract_tiny,
    files_below,
    flip_byte,
    make_given,
    planned_bytes,
    readable_content,
    receipts_in,
    repair_tiny,
    write_store,
)

from carryon.cache.base.model import Base
from carryon.cache.errors import DamagedStoreError
from carryon.cache.format.codec import shard_index
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.zarr_metadata import shard_path
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify

NUM_CHUNKS = 4


def kind_of(path: str) -> str:
    """What sort of file it is: its path without the numbers of units and chunks."""
    return re.sub(r"(?<=/)\d+", "N", path)


def one_of_each_kind(root: Path) -> dict[str, str]:
    """The last file of each kind, by kind."""
    return {kind_of(path): path for path in sorted(files_below(root))}


def read_right_or_refuse(root: Path, expected: dict[str, object]) -> bool:
    """Read all of a store: the right numbers (True), or DamagedStoreError (False)."""
    try:
        found = readable_content(root)
    except DamagedStoreError:
        return False
    assert found == expected, "wrong numbers were read"
    return True


def test_a_changed_byte_in_any_kind_of_file_is_named(store_folder: Path) -> None:
    picks = random.Random(0)
    kinds = one_of_each_kind(store_folder)
    assert len(kinds) > 50
    kinds.pop("zarr.json")  # names all others: see test_cache_manifest
    receipt = {kinds.pop("units/N.json")}  # names the files of its unit
    copies = {path for kind, path in kinds.items() if kind.startswith("units/copy/")}
    for paths in (set(kinds.values()) - copies, copies, receipt):
        original = {path: (store_folder / path).read_bytes() for path in paths}
        for path, content in original.items():
            flip_byte(store_folder / path, picks.randrange(len(content)))
        report = verify(store_folder, depth="full")
        assert {problem.path for problem in report.problems} == paths
        for path, content in original.items():
            (store_folder / path).write_bytes(content)
    assert verify(store_folder, depth="full").is_complete


def test_a_changed_byte_in_any_kind_of_file_is_never_returned_as_data(store_folder: Path) -> None:
    expected = readable_content(store_folder)
    picks = random.Random(1)
    for kind, path in one_of_each_kind(store_folder).items():
        if kind.startswith("units/copy/"):
            continue  # only repair reads it
        original = (store_folder / path).read_bytes()
        flip_byte(store_folder / path, picks.randrange(len(original)))
        assert read_right_or_refuse(store_folder, expected) == (kind in NOT_READ), path
        (store_folder / path).write_bytes(original)


NOT_READ = {"units/c/N"}
"""Tokens of each unit: for people with zarr-python; we count from the sample tables."""


@pytest.mark.slow
def test_bytes_changed_at_random_are_detected_named_and_repaired(
    store_folder: Path, tiny_base: Base, request: pytest.FixtureRequest
) -> None:
    rounds = request.config.getoption("--corruption-rounds")
    expected, original = readable_content(store_folder), files_below(store_folder)
    picks = random.Random(rounds)
    paths = sorted(original)
    num_noticed = num_refused = 0
    for _ in range(rounds):
        path = picks.choice(paths)
        offset, mask = picks.randrange(len(original[path])), 1 << picks.randrange(8)
        flip_byte(store_folder / path, offset, mask=mask)
        problems = [each for each in verify(store_folder, depth="full").problems]
        num_noticed += path in [problem.path for problem in problems]
        num_refused += not read_right_or_refuse(store_folder, expected)
        before = receipts_in(store_folder)
        report = repair_tiny(store_folder, tiny_base)
        assert report.is_complete, f"{path} at {offset}: {report}"
        unit = unit_of(path)
        is_computed = unit is not None and not path.startswith(("units/copy", "tok", "los", "cha"))
        assert report.computed_units == ([unit] if is_computed else [])
        after = receipts_in(store_folder)
        untouched = {name for name in before if name != f"{unit}.json"}
        assert {name: after[name] for name in untouched} == {
            name: before[name] for name in untouched
        }
        assert without_seconds(files_below(store_folder)) == without_seconds(original), path
    print(
        f"{num_noticed} of {rounds} noticed; reads: {num_refused} refused, "
        f"{rounds - num_refused} right, 0 wrong"
    )
    assert num_noticed == rounds


def unit_of(path: str) -> int | None:
    """The unit that a file belongs to, or None for the plan."""
    found = re.fullmatch(
        r"(?:units/copy/)?(?:hidden/[^/]+|tokens|loss_mask|char_end)/c/(\d+)(?:/0)?|units/(\d+).json",
        path,
    )
    return None if found is None else int(found[1] or found[2])


def without_seconds(files: dict[str, bytes]) -> dict[str, bytes]:
    """Files with the seconds, and so the digests, taken out of receipts."""
    times = re.compile(rb'\n "(elapsed_s|sha256)": [^\n]*')
    return {
        path: times.sub(b"", content) if re.fullmatch(r"units/\d+\.json", path) else content
        for path, content in files.items()
    }


def places_in(shard: bytes) -> Iterator[tuple[int, str]]:
    """An offset within each chunk of a shard and within its index, and what names it."""
    for number, (offset, num_bytes) in enumerate(
        shard_index(memoryview(shard), num_chunks=NUM_CHUNKS, name="shard")
    ):
        for place in (offset, offset + num_bytes // 2, offset + num_bytes - 1):
            yield place, f"chunk {number}: checksum does not match"
    yield len(shard) - 1, "index is damaged"
    yield len(shard) - 4 - 16 * NUM_CHUNKS, "index is damaged"


def test_a_changed_byte_of_a_shard_is_named_by_unit_tap_and_chunk(store_folder: Path) -> None:
    path = shard_path("layer.1", 2)
    shard = (store_folder / path).read_bytes()
    for offset, what in places_in(shard):
        flip_byte(store_folder / path, offset)
        (problem,) = verify(store_folder, depth="full").problems
        assert (problem.path, problem.unit) == (path, 2)
        assert re.fullmatch(f"tap layer.1:? {what}", problem.text), problem.text
        with pytest.raises(DamagedStoreError, match=f"unit 2 tap layer.1:? {what}. Fix: "):
            Store.open(store_folder).read_unit(2)
        (store_folder / path).write_bytes(shard)


def test_a_part_of_a_shard_is_read_while_another_part_is_damaged(store_folder: Path) -> None:
    store = Store.open(store_folder)
    unit = store.read_unit(2)
    path = store_folder / shard_path("final", 2)
    offset, _ = shard_index(memoryview(path.read_bytes()), num_chunks=NUM_CHUNKS, name="x")[3]
    first = unit.samples[0]
    assert unit.rows_of(first).stop <= 48  # in the first three chunks of 16 rows
    flip_byte(path, offset)
    rows = store.read_sample(first, taps=["final"])
    assert rows.hidden["final"].tobytes() == unit.hidden["final"][unit.rows_of(first)].tobytes()


@pytest.mark.parametrize("profile", ["near", "compact"])
def test_damaged_scales_of_a_lossy_store_are_detected(store_tmp: Path, profile: str) -> None:
    settings = StoreSettings.from_dict(SETTINGS.to_dict() | {"profile": profile})
    root = store_tmp / "store"
    write_store(root, make_given(settings=settings))
    expected = readable_content(root)
    paths = [path for path in one_of_each_kind(root).values() if path.startswith("scale/")]
    assert len(paths) == 2 + 2 * 2 * 2 + 1  # groups; document and file of each kind and tap
    for path in paths:
        original = (root / path).read_bytes()
        flip_byte(root / path, len(original) // 2)
        report = verify(root, depth="full")
        assert path in [problem.path for problem in report.problems]
        assert not read_right_or_refuse(root, expected)
        (root / path).write_bytes(original)


def test_one_damaged_file_of_every_kind_is_repaired(store_folder: Path, tiny_base: Base) -> None:
    original = files_below(store_folder)
    kinds = {
        kind: path
        for kind, path in one_of_each_kind(store_folder).items()
        if not kind.startswith("units/copy/")  # else both of a pair would be gone
    }
    for path in kinds.values():
        flip_byte(store_folder / path, len(original[path]) // 2)
    report = repair_tiny(store_folder, tiny_base)
    assert report.is_complete
    assert without_seconds(files_below(store_folder)) == without_seconds(original)
    last_unit = max(unit for unit in map(unit_of, kinds.values()) if unit is not None)
    assert report.computed_units == [last_unit]


def test_all_copies_damaged_at_once_are_repaired_without_the_base(store_folder: Path) -> None:
    original = files_below(store_folder)
    copies = [path for path in original if path.startswith("units/copy/")]
    for path in copies:
        flip_byte(store_folder / path, len(original[path]) // 2)

    def no_base(_: Manifest) -> Base:
        raise AssertionError("the base is not needed")

    report = repair_tiny(store_folder, no_base)
    assert report.is_complete
    assert sorted(report.restored_files) == sorted(copies)
    assert files_below(store_folder) == original


def test_damage_within_an_unfinished_store_is_detected_and_repaired(
    tiny_base: Base, store_data: Path, store_original: Path, store_tmp: Path
) -> None:
    root = store_tmp / "store"
    planned = planned_bytes(store_original)
    report = extract_tiny(tiny_base, store_data, root, max_disk_bytes=planned)
    assert report.computed_units == 0
    original = files_below(root)
    for name in ("tokens", "loss_mask", "char_end"):
        flip_byte(root / f"{name}/c/1", 30)
        with pytest.raises(DamagedStoreError, match=f"{name}/c/1: checksum does not match"):
            extract_tiny(tiny_base, store_data, root)
        assert f"{name}/c/1" in [each.path for each in verify(root, depth="full").problems]
        (root / f"{name}/c/1").write_bytes(original[f"{name}/c/1"])
    flip_byte(root / "char_end/c/1", 30)
    repaired = repair_tiny(root, tiny_base)
    assert repaired.is_complete
    assert repaired.restored_files == ["char_end/c/1"]
    assert readable_content(root) == readable_content(store_original)
