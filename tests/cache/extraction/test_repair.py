"""Repair: files it restores, units it computes, stores it refuses."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.tiny_bases import make_tiny_base
from support.tiny_stores import (
    FORWARD,
    files_below,
    flip_byte,
    make_given,
    plan_given,
    readable_content,
    receipts_in,
    repair_tiny,
    small_pieces,
    states_at_kills,
    write_units,
)

from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import DamagedStoreError, MissingError, SettingMismatchError
from carryon.cache.format.zarr_metadata import copy_path, receipt_path, row_path, shard_path
from carryon.cache.settings import ForwardSettings

NO_BASE = "./no/such/base"


def middle_flipped(*paths: Path) -> None:
    for path in paths:
        flip_byte(path, path.stat().st_size // 2)


def cut_off(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-10])
    return path


@dataclass(frozen=True, kw_only=True)
class Case:
    id: str
    damage: Callable[[Path], object]
    computed: list[int]
    restored: list[str]


CASES = [
    Case(
        id="shard missing",
        damage=lambda root: (root / shard_path("final", 2)).unlink(),
        computed=[2],
        restored=[],
    ),
    Case(
        id="shards of two units swapped",
        damage=lambda root: swap(root / shard_path("final", 2), root / shard_path("final", 4)),
        computed=[2, 4],
        restored=[],
    ),
    Case(
        id="receipt missing",
        damage=lambda root: (root / receipt_path(3)).unlink(),
        computed=[3],
        restored=[],
    ),
    Case(
        id="receipt of another unit",
        damage=lambda root: shutil.copy(root / receipt_path(1), root / receipt_path(3)),
        computed=[3],
        restored=[],
    ),
    Case(
        id="tokens cut off, and their shard damaged",
        damage=lambda root: middle_flipped(
            cut_off(root / row_path("tokens", 1)), root / shard_path("layer.1", 1)
        ),
        computed=[1],
        restored=["tokens/c/1"],
    ),
    Case(
        id="receipt damaged, and the tokens of its unit",
        damage=lambda root: middle_flipped(root / receipt_path(1), root / row_path("tokens", 1)),
        computed=[1],
        restored=["tokens/c/1"],
    ),
    Case(
        id="manifest missing",
        damage=lambda root: (root / "zarr.json").unlink(),
        computed=[],
        restored=["zarr.json"],
    ),
    Case(
        id="copy of the manifest missing",
        damage=lambda root: (root / copy_path("zarr.json")).unlink(),
        computed=[],
        restored=["units/copy/zarr.json"],
    ),
    Case(
        id="all files of the head missing",
        damage=lambda root: shutil.rmtree(root / "head"),
        computed=[],
        restored=[
            "head/zarr.json",
            *(f"head/lm_head/c/{number}/0" for number in range(5)),
            "head/lm_head/zarr.json",
            "head/norm_weight/c/0",
            "head/norm_weight/zarr.json",
        ],
    ),
    Case(
        id="partial file of a killed writer",
        damage=lambda root: (root / ".zarr.json.4711.partial").write_text("{"),
        computed=[],
        restored=[],
    ),
]


def swap(one: Path, other: Path) -> None:
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_repair_restores_damaged_files_and_changes_nothing_else(
    store_folder: Path, tiny_base: Base, case: Case
) -> None:
    expected, before = readable_content(store_folder), files_below(store_folder)
    receipts = receipts_in(store_folder)
    case.damage(store_folder)
    report = repair_tiny(store_folder, tiny_base)
    assert report.is_complete
    assert report.computed_units == case.computed
    assert sorted(report.restored_files) == sorted(case.restored)
    assert readable_content(store_folder) == expected
    after = files_below(store_folder)
    remade = {receipt_path(unit) for unit in case.computed}  # their seconds are new
    assert {path: after[path] for path in after if path not in remade} == {
        path: before[path] for path in before if path not in remade
    }
    now = receipts_in(store_folder)
    untouched = [name for name in receipts if f"units/{name}" not in remade]
    assert [now[name] for name in untouched] == [receipts[name] for name in untouched]


def test_a_sound_store_is_not_changed_and_needs_no_base(store_folder: Path) -> None:
    before = files_below(store_folder)
    report = repair_tiny(store_folder, NO_BASE)
    assert (report.problems, report.restored_files, report.computed_units) == ([], [], [])
    assert report.is_complete
    assert files_below(store_folder) == before


@pytest.mark.parametrize(
    "path",
    ["zarr.json", "samples/start/c/0", "probe/rows/c/0", "hidden/final/zarr.json", "tokens/c/1"],
)
def test_a_file_damaged_together_with_its_copy_is_named(store_folder: Path, path: str) -> None:
    for each in (path, copy_path(path)):
        middle_flipped(store_folder / each)
    before = files_below(store_folder)
    what = "the manifest and its copy" if path == "zarr.json" else f"{path} and its copy"
    with pytest.raises(DamagedStoreError, match=f"{what} are both damaged"):
        repair_tiny(store_folder, NO_BASE)
    assert files_below(store_folder) == before


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="expected a store"):
        repair_tiny(tmp_path / "none", NO_BASE)
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_refused_before_anything_is_computed(
    store_folder: Path, tmp_path: Path
) -> None:
    middle_flipped(store_folder / shard_path("final", 1))
    before = files_below(store_folder)
    other = load_base(str(make_tiny_base(tmp_path / "other", seed=1)), forward=FORWARD)
    with pytest.raises(SettingMismatchError, match="base.weights_sha256: expected .*, got"):
        repair_tiny(store_folder, other)
    assert files_below(store_folder) == before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"compute_dtype": "bfloat16"},
            "compute_dtype: expected float32, .* got bfloat16",
        ),
        ({"attention": "eager"}, "attention: expected sdpa, .* got eager"),
    ],
    ids=["compute dtype", "attention"],
)
def test_the_same_base_with_other_forward_settings_is_refused(
    store_folder: Path, tiny_base_folder: Path, change: dict[str, str], text: str
) -> None:
    middle_flipped(store_folder / shard_path("final", 1))
    before = files_below(store_folder)
    forward = ForwardSettings.from_dict(FORWARD.to_dict() | change)
    base = load_base(str(tiny_base_folder), forward=forward)
    with pytest.raises(SettingMismatchError, match=text):
        repair_tiny(store_folder, base)
    assert files_below(store_folder) == before


def test_a_store_whose_files_contradict_each_other_is_not_repaired(store_tmp: Path) -> None:
    given, root = make_given(), store_tmp / "store"
    with small_pieces():
        manifest = plan_given(root, given)
    given.hidden["layer.1"][:] = given.hidden["final"]
    write_units(root, manifest, given, range(manifest.num_units))
    before = files_below(root)
    with pytest.raises(DamagedStoreError, match="tap layer.1 does not hold the base.s states"):
        repair_tiny(root, NO_BASE)
    assert files_below(root) == before


def test_repair_killed_before_any_change_is_resumed_by_the_same_call(
    store_folder: Path, tiny_base: Base, store_tmp: Path
) -> None:
    expected = readable_content(store_folder)
    for path in (shard_path("final", 1), row_path("tokens", 2), "samples/id/c/0/0", "zarr.json"):
        middle_flipped(store_folder / path)
    root, into = store_tmp / "run", store_tmp / "killed"
    into.mkdir()
    shutil.copytree(store_folder, root)
    copies = states_at_kills(
        root,
        lambda: repair_tiny(root, tiny_base),
        at=lambda number: number % 2 == 0,
        into=into,
    )
    assert len(copies) >= 6
    for copy in copies:
        assert repair_tiny(copy, tiny_base).is_complete
        assert readable_content(copy) == expected
