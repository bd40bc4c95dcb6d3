"""Reports of verify on stores that are missing, unfinished, mixed up or not stores."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import zarr
from support.tiny_stores import (
    SETTINGS,
    UNIT_TOKENS,
    WIDTH,
    Given,
    files_below,
    flip_byte,
    make_given,
    plan_given,
    small_pieces,
    write_store,
    write_units,
)

from carryon.cache.errors import DamagedStoreError, MissingError, StoreError
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.receipt import read_receipt
from carryon.cache.format.zarr_metadata import copy_path, receipt_path, row_path, shard_path
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import Depth, VerifyReport, verify

DEPTHS: list[Depth] = ["quick", "sample", "full"]


@pytest.fixture
def root(store_tmp: Path) -> Path:
    """A finished store written from arrays."""
    write_store(store_tmp / "store", make_given())
    return store_tmp / "store"


def named(report: VerifyReport) -> set[str]:
    return {problem.path for problem in report.problems}


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_sound_store_has_no_problem(root: Path, depth: Depth) -> None:
    before = files_below(root)
    report = verify(root, depth=depth)
    assert (report.problems, report.is_sound, report.is_complete) == ([], True, True)
    assert files_below(root) == before  # nothing is written
    if depth == "full":
        assert report.num_files == len(before)  # every file of the store is looked at


def test_full_reads_every_byte_of_the_store(root: Path) -> None:
    report = verify(root, depth="full")
    assert report.num_bytes == sum(map(len, files_below(root).values()))


@dataclass(frozen=True, kw_only=True)
class Harm:
    id: str
    path: str
    harm: Callable[[Path], object]
    text: str


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


HARMS = [
    Harm(id="shard cut off", path=shard_path("final", 1), harm=cut, text="expected [0-9]+ bytes"),
    Harm(id="shard empty", path=shard_path("final", 1), harm=lambda path: path.write_bytes(b""),
         text="expected [0-9]+ bytes, got 0"),
    Harm(id="shard longer", path=shard_path("final", 1), harm=lengthen, text="bytes, got"),
    Harm(id="shard missing", path=shard_path("layer.1", 1), harm=Path.unlink, text="is missing"),
    Harm(id="tokens missing", path=row_path("tokens", 1), harm=Path.unlink, text="is missing"),
    Harm(id="tokens cut off", path=row_path("tokens", 1), harm=cut, text="expected [0-9]+ bytes"),
    Harm(id="copy missing", path=copy_path(row_path("tokens", 1)), harm=Path.unlink,
         text="is missing"),
    Harm(id="document missing", path="hidden/final/zarr.json", harm=Path.unlink,
         text="is missing"),
    Harm(id="document of the root of the head", path="head/zarr.json", harm=cut, text="SHA-256"),
    Harm(id="its copy", path=copy_path("head/zarr.json"), harm=cut, text="SHA-256"),
    Harm(id="table missing", path="samples/start/c/0", harm=Path.unlink, text="is missing"),
    Harm(id="head missing", path="head/lm_head/c/0/0", harm=Path.unlink, text="is missing"),
    Harm(id="norm", path="head/norm_weight/c/0", harm=cut, text="SHA-256"),
    Harm(id="probe", path="probe/top_logits/c/0/0", harm=cut, text="SHA-256"),
    Harm(id="receipt cut off", path=receipt_path(1), harm=cut, text="receipt is damaged"),
    Harm(id="manifest cut off", path="zarr.json", harm=cut, text="not the zarr.json of a group"),
    Harm(id="manifest missing", path="zarr.json", harm=Path.unlink, text="its copy is there"),
    Harm(id="copy of the manifest", path=copy_path("zarr.json"), harm=cut, text="not the zarr"),
]  # fmt: skip


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("case", HARMS, ids=lambda case: case.id)
def test_each_depth_names_what_is_missing_or_cut_off(root: Path, depth: Depth, case: Harm) -> None:
    case.harm(root / case.path)
    report = verify(root, depth=depth)
    assert named(report) == {case.path}
    assert pytest.approx(0) == len([p for p in report.problems if p.is_missing_unit])
    assert_text(report, case.text)
    assert not report.is_sound


def assert_text(report: VerifyReport, text: str) -> None:
    with pytest.raises(DamagedStoreError, match=text):
        raise DamagedStoreError(report.problems[0].text)


def test_quick_does_not_see_a_changed_byte_of_a_shard_and_sample_may(root: Path) -> None:
    num_units = Store.open(root).num_units
    for unit in range(1, num_units):
        flip_byte(root / shard_path("final", unit), 20)  # in the first of four chunks
    assert verify(root, depth="quick").is_sound
    assert not verify(root, depth="sample").is_sound
    assert len(named(verify(root, depth="full"))) == num_units - 1


def test_sample_looks_at_other_chunks_with_another_seed(root: Path) -> None:
    for unit in range(1, Store.open(root).num_units):
        flip_byte(root / shard_path("final", unit), 20)
    seen = {frozenset(named(verify(root, depth="sample", seed=seed))) for seed in range(4)}
    assert len(seen) > 1
    again = [named(verify(root, depth="sample", seed=3)) for _ in range(2)]
    assert again[0] == again[1]


# Files from elsewhere, each sound in itself


@pytest.fixture
def even(store_tmp: Path) -> Given:
    """Units without unused rows, in float32 that does not compress: shards of equal sizes."""
    given = make_given(num_samples=10, num_tokens=UNIT_TOKENS)
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 16, size=given.hidden["layer.1"].shape, dtype=np.uint16)
    bits[(bits & 0x7F80) == 0x7F80] = 0  # infinite or not a number
    given.hidden["layer.1"][:] = (bits.astype(np.uint32) << 16).view(np.float32)
    write_store(store_tmp / "even", given)
    return given


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    assert first != second
    one.write_bytes(second)
    other.write_bytes(first)


def test_swapped_shards_of_equal_size_are_named_and_not_read(store_tmp: Path, even: Given) -> None:
    root = store_tmp / "even"
    paths = [shard_path("layer.1", unit) for unit in (3, 4)]
    assert (root / paths[0]).stat().st_size == (root / paths[1]).stat().st_size
    swap(root / paths[0], root / paths[1])
    assert verify(root, depth="quick").is_sound  # names and sizes fit
    report = verify(root, depth="full")
    assert named(report) == set(paths)
    assert_text(report, "tap layer.1: its SHA-256 is not the receipt's, though every chunk decod")
    store = Store.open(root)
    for unit in (3, 4):
        with pytest.raises(DamagedStoreError, match="chunk 0: the checksum is valid but differs"):
            store.read_unit(unit)
        sample = store.unit_samples(unit).start
        with pytest.raises(DamagedStoreError, match="chunk 1: the checksum is valid but differs"):
            store.read_sample(sample, start=20, stop=30)


def test_swapped_tokens_of_equal_size_are_named_and_not_read(store_tmp: Path, even: Given) -> None:
    root = store_tmp / "even"
    units = range(read_manifest(root).num_units)
    sizes = {unit: (root / row_path("tokens", unit)).stat().st_size for unit in units}
    one, other = next((a, b) for a in units for b in units if 0 < a < b and sizes[a] == sizes[b])
    swap(root / row_path("tokens", one), root / row_path("tokens", other))
    assert named(verify(root, depth="full")) == {row_path("tokens", u) for u in (one, other)}
    with pytest.raises(DamagedStoreError, match=f"tokens/c/{one}: the checksum is valid"):
        Store.open(root).read_unit(one)


def test_swapped_tables_are_named_and_not_read(store_tmp: Path) -> None:
    root = store_tmp / "store"
    write_store(root, make_given())
    swap(root / "samples/length/c/0", root / "samples/length/c/1")
    assert named(verify(root, depth="full")) == {"samples/length/c/0", "samples/length/c/1"}
    with pytest.raises(DamagedStoreError, match="samples/length/c/0: the checksum is valid"):
        Store.open(root).read_unit(1)


def test_swapped_chunks_of_the_head_are_named_and_not_read(store_tmp: Path) -> None:
    root = store_tmp / "store"
    write_store(root, make_given())
    swap(root / "head/lm_head/c/1/0", root / "head/lm_head/c/2/0")
    assert named(verify(root, depth="full")) == {"head/lm_head/c/1/0", "head/lm_head/c/2/0"}
    with pytest.raises(DamagedStoreError, match="head/lm_head/c/[12]/0: the checksum is valid"):
        Store.open(root).head()


def test_a_receipt_of_another_store_is_named_and_its_unit_not_read(
    root: Path, store_tmp: Path
) -> None:
    other = store_tmp / "other"
    write_store(other, make_given(seed=1))
    shutil.copy(other / receipt_path(1), root / receipt_path(1))
    assert_foreign(root)


def test_a_receipt_of_another_unit_is_named_and_its_unit_not_read(root: Path) -> None:
    shutil.copy(root / receipt_path(2), root / receipt_path(1))
    assert_foreign(root)


def test_a_whole_unit_of_another_store_is_named_and_not_read(root: Path, store_tmp: Path) -> None:
    other = store_tmp / "other"
    write_store(other, make_given(seed=1))
    for path in read_receipt(other, read_manifest(other), 1).files:
        shutil.copy(other / path, root / path)
        if path.startswith(("tokens", "loss_mask", "char_end")):
            shutil.copy(other / path, root / copy_path(path))
    shutil.copy(other / receipt_path(1), root / receipt_path(1))
    assert_foreign(root)


def assert_foreign(root: Path) -> None:
    report = verify(root, depth="full")
    assert named(report) == {receipt_path(1)}
    assert_text(report, "expected the receipt of unit 1 of this store, got one of unit")
    with pytest.raises(DamagedStoreError, match="expected the receipt of unit 1 of this store"):
        Store.open(root).read_unit(1)


# Unfinished stores, and folders that are not stores


def test_missing_units_are_reported_as_missing_not_as_damaged(store_tmp: Path) -> None:
    given, root = make_given(), store_tmp / "store"
    with small_pieces():
        manifest = plan_given(root, given)
    write_units(root, manifest, given, [0, 2])
    report = verify(root, depth="full")
    assert (report.is_sound, report.is_complete) == (True, False)
    missing = sorted(set(range(manifest.num_units)) - {0, 2})
    assert [problem.unit for problem in report.problems] == missing
    assert all(problem.is_missing_unit for problem in report.problems)


def test_the_probe_of_an_unfinished_store_is_checked(store_tmp: Path) -> None:
    given, root = make_given(), store_tmp / "store"
    with small_pieces():
        manifest = plan_given(root, given)
    given.hidden["layer.1"][:] = given.hidden["final"]
    write_units(root, manifest, given, [0])
    problems = [each for each in verify(root, depth="quick").problems if not each.is_missing_unit]
    assert [problem.path for problem in problems] == ["probe"]
    assert "tap layer.1 does not hold the base's states" in problems[0].text


def test_a_folder_without_a_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="expected a store"):
        verify(tmp_path, depth="quick")
    assert list(tmp_path.iterdir()) == []


def test_another_zarr_group_is_not_a_store(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "theirs", mode="w")
    group.create_array("numbers", shape=(UNIT_TOKENS, WIDTH), dtype="float32")
    with pytest.raises(StoreError, match="a Zarr group, but not a store of carryon") as caught:
        verify(tmp_path / "theirs", depth="full")
    assert not isinstance(caught.value, DamagedStoreError)


def test_a_store_of_a_later_format_says_what_to_install(root: Path) -> None:
    from carryon.cache.format import manifest as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FORMAT_VERSION", 2)
        write_store(root.parent / "later", make_given(settings=SETTINGS))
    with pytest.raises(
        StoreError, match="expected format version 1, got 2. Fix: install"
    ) as caught:
        Store.open(root.parent / "later")
    assert not isinstance(caught.value, DamagedStoreError)


def test_a_report_is_plain_json(root: Path) -> None:
    report = verify(root, depth="quick").to_dict()
    assert report["is_complete"] is True
    assert report["depth"] == "quick"
