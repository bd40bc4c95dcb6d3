"""Decoded states in a folder: the same bits, and nothing but what this user's own runs wrote.

A tiny store has 60 samples of 5 to 12 tokens in some 8 units of 64 rows; a unit at a tap is a file.
"""

import gc
import json
import logging
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from numpy.typing import NDArray
from support.decoded_caches import (
    cache_at,
    files_of,
    open_store,
    read_and_die,
    read_often,
    states_of,
)
from support.small_disks import PAGE, file_size_limit, pages_used, resize
from support.tiny_train_stores import make_tiny_store

from carryon.cache.corpus.reading.cache_folder import cache_folder
from carryon.cache.errors import DamagedStoreError, InputError
from carryon.cache.files.documents import json_bytes, sealed
from carryon.cache.files.private_key import read_or_make_key
from carryon.cache.format import zarr_metadata
from carryon.cache.format.manifest import sha256_hex
from carryon.cache.format.zarr_metadata import receipt_path, shard_path
from carryon.cache.store.decoded_cache import KEY, open_cache
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_reader import CopyRange

MANY_GB = 1.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("decoded") / "store", num_samples=60)


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARRYON_CACHE", str(tmp_path / "own"))


def assert_same(ours: list[NDArray[Any]], theirs: list[NDArray[Any]]) -> None:
    for one, two in zip(ours, theirs, strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("profile", ["exact", "raw", "near"])
def test_the_second_reading_maps_the_same_bits(tmp_path: Path, profile: str) -> None:
    folder = make_tiny_store(tmp_path / "store", num_samples=60, profile=profile)
    cache = cache_at(tmp_path / "cache")
    store, plain = open_store(folder, cache), states_of(open_store(folder, None))

    for _ in range(2):
        assert_same(states_of(store), plain)

    num_files = store.num_units
    facts = cache.facts()
    assert (facts["misses"], facts["hits"], facts["written"]) == (num_files,) * 3
    assert facts["hit_bytes"] == sum(states.nbytes for states in plain)
    assert facts["written_bytes"] == sum(path.stat().st_size for path in files_of(cache.root))
    assert len(files_of(cache.root)) == num_files


def test_a_later_run_compares_each_file_once_and_decodes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = states_of(open_store(folder, cache_at(tmp_path / "cache")))
    shutil.copytree(folder, tmp_path / "copy")  # the same content elsewhere
    later = cache_at(tmp_path / "cache")
    compared: list[bytes] = []
    own_hmac = later._hmac
    monkeypatch.setattr(
        later, "_hmac", lambda *parts: (compared.append(bytes(parts[0])), own_hmac(*parts))[1]
    )
    store = open_store(tmp_path / "copy", later)
    monkeypatch.setattr(store._files, "iter_states", lambda *_: pytest.fail("decoded"))

    for _ in range(2):
        assert_same(states_of(store), plain)

    names = [name for name in compared if name.endswith(b".states")]
    assert len(names) == len(set(names)) == len(files_of(tmp_path / "cache"))
    assert later.facts()["hits"] == 2 * len(names)


def test_a_unit_of_several_chunks_is_kept_chunk_by_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zarr_metadata, "CHUNK_BYTES", 512)
    folder = make_tiny_store(tmp_path / "store")
    store = open_store(folder, cache_at(tmp_path / "cache"))
    assert store.receipt(0).num_tokens > 3 * store.manifest.rows_per_chunk

    for _ in range(2):
        assert_same(states_of(store), states_of(open_store(folder, None)))


def test_rows_of_no_sample_are_read_from_the_store(folder: Path, tmp_path: Path) -> None:
    cache = cache_at(tmp_path / "cache")
    store = open_store(folder, cache)
    read = np.full((store.unit_tokens, store.width), 7, dtype=store.states_dtype)

    store.copy_states(0, "final", [CopyRange(first=0, stop=store.unit_tokens, to=read)])

    np.testing.assert_array_equal(read, store.read_unit(0).hidden["final"])
    assert not files_of(cache.root)


def test_another_store_has_other_files(folder: Path, tmp_path: Path) -> None:
    cache = cache_at(tmp_path / "cache")
    other = make_tiny_store(tmp_path / "other", num_samples=60, samples_seed=5)
    states_of(open_store(folder, cache))
    written = cache.facts()["written"]

    other_units = Store.open(other).num_units
    for _ in range(2):
        assert_same(states_of(open_store(other, cache)), states_of(open_store(other, None)))

    assert cache.facts()["written"] == written + other_units


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def _flip_digest(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _swap(path: Path) -> None:
    seen: dict[int, Path] = {}
    for one in files_of(path.parent):
        if (two := seen.get(one.stat().st_size)) is not None:
            content = one.read_bytes()
            one.write_bytes(two.read_bytes())
            two.write_bytes(content)
            return
        seen[one.stat().st_size] = one
    pytest.fail("no two files of one size")


def _link(path: Path) -> None:
    moved = path.parent.parent / "elsewhere"
    path.rename(moved)
    path.symlink_to(moved)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [_flip, _flip_digest, _cut, _empty, _lengthen, _swap, _link, _pipe, _folder]


@pytest.mark.parametrize("is_running", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_written_is_decoded_again(
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Any,  # noqa: ANN401
    is_running: bool,
) -> None:
    cache = cache_at(tmp_path / "cache")
    store = open_store(folder, cache)
    plain = states_of(store)
    damage(files_of(cache.root)[1])
    if not is_running:
        del store, cache
        gc.collect()
        cache = cache_at(tmp_path / "cache")
        store = open_store(folder, cache)

    assert_same(states_of(store), plain)

    assert cache.facts()["refused"] >= 1
    assert sum("is not as it was written" in line for line in caplog.messages) == 1
    hits = cache.facts()["hits"]
    assert_same(states_of(store), plain)
    still = damage is _folder  # which is not removed, so its unit is decoded each time
    assert cache.facts()["hits"] - hits == len(files_of(cache.root)) - still
    if damage is _link:
        assert (tmp_path / "elsewhere").is_file()
        assert not files_of(cache.root)[1].is_symlink()


def test_files_of_a_stranger_are_not_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = cache_at(tmp_path / "cache")
    plain = states_of(open_store(folder, own))
    names = files_of(tmp_path / "cache")
    monkeypatch.setenv("CARRYON_CACHE", str(tmp_path / "theirs"))
    theirs = cache_at(tmp_path / "strange")
    states_of(open_store(folder, theirs))
    assert not {path.name for path in names} & {path.name for path in files_of(theirs.root)}

    # Even under the names of ours, with other states and a digest that fits them.
    for path in names:
        content = np.frombuffer(path.read_bytes(), np.uint8)[:-32].copy()
        content[::2] ^= 1
        digest = theirs._hmac(path.name.encode(), content.data).digest()
        path.write_bytes(content.tobytes() + digest)
    later = cache_at(tmp_path / "cache")
    monkeypatch.setattr(later, "_key", own._key)

    assert_same(states_of(open_store(folder, later)), plain)
    assert later.facts()["refused"] == len(names)


def test_a_store_with_forged_checksums_adds_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    honest = make_tiny_store(tmp_path / "honest", profile="raw")
    forged = Path(shutil.copytree(honest, tmp_path / "forged"))
    unit = 2
    path, receipt_file = forged / shard_path("final", unit), forged / receipt_path(unit)
    store = Store.open(honest)
    assert store.manifest.rows_per_chunk == store.unit_tokens
    content = bytearray(path.read_bytes())
    content[3] ^= 0x10
    rows = store.unit_tokens * store.width * 2
    content[rows : rows + 4] = int(google_crc32c.value(bytes(content[:rows]))).to_bytes(4, "little")
    path.write_bytes(content)
    receipt = json.loads(receipt_file.read_bytes())
    receipt.pop("sha256")
    receipt["files"][shard_path("final", unit)]["chunks"] = [bytes(content[rows : rows + 4]).hex()]
    receipt_file.write_bytes(json_bytes(sealed(receipt)))
    cache = cache_at(tmp_path / "cache")

    assert_same(states_of(open_store(forged, cache)), states_of(open_store(forged, None)))

    assert cache.facts()["written"] == store.num_units - 1
    assert "a unit is not kept" in caplog.text
    assert "SHA-256" in caplog.text
    assert_same(states_of(open_store(honest, cache)), states_of(open_store(honest, None)))


def test_a_damaged_store_is_refused_as_without_a_cache(folder: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(folder, tmp_path / "store"))
    path = damaged / shard_path("final", 1)
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)

    with pytest.raises(DamagedStoreError, match="unit 1 tap final"):
        states_of(open_store(damaged, cache_at(tmp_path / "cache")))


def test_what_fits_stays_and_the_limit_holds(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole = cache_at(tmp_path / "whole")
    plain = states_of(open_store(folder, whole))
    sizes = [path.stat().st_size for path in files_of(whole.root)]
    limit = sum(sizes) // 2
    cache = cache_at(tmp_path / "cache", max_bytes=limit)
    store = open_store(folder, cache)

    assert_same(states_of(store), plain)
    first = {path: path.stat().st_ino for path in files_of(cache.root)}
    for _ in range(2):
        hits = cache.facts()["hits"]
        assert_same(states_of(store), plain)
        assert cache.facts()["hits"] - hits == len(first)

    assert {path: path.stat().st_ino for path in files_of(cache.root)} == first
    assert limit - max(sizes) < sum(path.stat().st_size for path in first) <= limit
    assert sum("--decoded-cache-gb" in line for line in caplog.messages) == 1


def test_one_writes_and_the_others_read(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    one, two = cache_at(tmp_path / "cache"), cache_at(tmp_path / "cache")
    plain = states_of(open_store(folder, None))
    half = open_store(folder, one)
    half.copy_states(0, "final", [CopyRange(first=0, stop=5, to=np.empty((5, 16), np.uint16))])

    assert_same(states_of(open_store(folder, two)), plain)

    assert (two.facts()["hits"], two.facts()["written"]) == (1, 0)
    assert "is writing to this decoded cache" in caplog.text
    del one, half
    gc.collect()
    assert_same(states_of(open_store(folder, two)), plain)
    assert two.facts()["written"] == two.facts()["misses"] // 2 > 0


def test_processes_at_one_folder_at_once_read_what_is_theirs(folder: Path, tmp_path: Path) -> None:
    other = make_tiny_store(tmp_path / "other", num_samples=60, samples_seed=5)
    context, root = multiprocessing.get_context("forkserver"), tmp_path / "cache"
    processes = [
        context.Process(target=read_often, args=(store, root, cache_folder(), 30))
        for store in (folder, other, folder)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert files_of(root)
    assert [path.name for path in root.iterdir() if path not in files_of(root)] == []


@pytest.mark.parametrize("after", [0, 3, 11, 40])
def test_a_kill_leaves_nothing_that_is_taken_for_whole(
    folder: Path, tmp_path: Path, after: int
) -> None:
    read_or_make_key(cache_folder() / KEY)
    root = tmp_path / "cache"
    process = multiprocessing.get_context("forkserver").Process(
        target=read_and_die, args=(folder, root, cache_folder(), after)
    )
    process.start()
    process.join()
    assert process.exitcode == -9
    assert list(root.glob(".*.partial"))

    cache = cache_at(root)
    store = open_store(folder, cache)
    for _ in range(2):
        assert_same(states_of(store), states_of(open_store(folder, None)))

    assert cache.facts()["refused"] == 0
    assert not list(root.glob(".*.partial"))
    assert len(files_of(root)) == store.num_units


@pytest.fixture
def disk_with_room(small_disk: Path) -> Path:
    resize(small_disk, (pages_used(small_disk) + 6) * PAGE)
    return small_disk


def test_a_full_disk_ends_in_one_warning(
    folder: Path, disk_with_room: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_at(disk_with_room / "cache")
    store = open_store(folder, cache)
    for _ in range(2):
        assert_same(states_of(store), states_of(open_store(folder, None)))
    facts = cache.facts()
    assert 0 < facts["written"] == facts["hits"] < facts["misses"]
    assert sum("the disk is full" in line for line in caplog.messages) == 1
    assert not list(cache.root.glob(".*.partial"))


def test_a_disk_that_refuses_a_file_ends_in_one_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_at(tmp_path / "cache")
    store, plain = open_store(folder, cache), states_of(open_store(folder, None))
    with file_size_limit(1000):
        for _ in range(2):
            assert_same(states_of(store), plain)
    assert cache.facts()["written"] == 0
    assert sum("the limit on the size of a file" in line for line in caplog.messages) == 1
    assert not list(cache.root.glob(".*.partial"))


def test_a_folder_of_something_else_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="decoded_cache: expected a folder .*file"):
        open_cache(str(tmp_path / "file"), max_gb=MANY_GB)
    with pytest.raises(InputError, match=r"decoded_cache: .* with .*Fix: give a folder of its own"):
        open_cache(str(folder), max_gb=MANY_GB)
    assert open_cache("", max_gb=MANY_GB) is None


def test_stores_of_a_process_share_one_cache(tmp_path: Path) -> None:
    one = open_cache(str(tmp_path / "new" / "cache"), max_gb=MANY_GB)
    two = open_cache(str(tmp_path / "new" / "." / "cache"), max_gb=2.0)
    assert one is not None
    assert one is two
    assert one.max_bytes == 2_000_000_000


def _lock_link(path: Path) -> None:
    (path.parent.parent / "target").write_text("mine")
    path.symlink_to(path.parent.parent / "target")


def _lock_text(path: Path) -> None:
    path.write_text("mine")


@pytest.mark.parametrize("plant", [_lock_link, _lock_text, Path.mkdir])
def test_a_strange_lock_ends_in_one_warning(
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    plant: Any,  # noqa: ANN401
) -> None:
    cache = cache_at(tmp_path / "cache")
    plant(cache.root / ".lock")
    store = open_store(folder, cache)
    for _ in range(2):
        assert_same(states_of(store), states_of(open_store(folder, None)))
    assert cache.facts()["written"] == 0
    assert sum("no more units are kept" in line for line in caplog.messages) == 1
    if plant is _lock_link:
        assert (tmp_path / "target").read_text() == "mine"


def test_a_planted_partial_file_is_not_followed(folder: Path, tmp_path: Path) -> None:
    names = [path.name for path in files_of(_filled(folder, tmp_path / "other"))]
    (tmp_path / "target").write_text("mine")
    root = tmp_path / "cache"
    root.mkdir()
    for name in names:
        (root / f".{name}.{os.getpid()}-abcdef01.partial").symlink_to(tmp_path / "target")

    cache = cache_at(root)
    states_of(open_store(folder, cache))

    assert (tmp_path / "target").read_text() == "mine"
    assert [path.name for path in files_of(root)] == names
    assert not list(root.glob(".*.partial"))


def _filled(folder: Path, root: Path) -> Path:
    states_of(open_store(folder, cache_at(root)))
    return root


def test_a_key_is_made_once_and_read_by_its_owner_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "new" / "key"
    key = read_or_make_key(path)
    assert read_or_make_key(path) == key == path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    assert read_or_make_key(path) != key
    for content in (b"", b"x" * 33):
        path.write_bytes(content)
        assert read_or_make_key(path) == path.read_bytes() != content
    (tmp_path / "target").write_bytes(b"k" * 32)
    path.unlink()
    path.symlink_to(tmp_path / "target")
    assert read_or_make_key(path) != b"k" * 32
    assert not caplog.messages
    path.unlink()
    path.mkdir()
    assert read_or_make_key(path) != read_or_make_key(path)
    assert "serves this process only" in caplog.text
    assert sha256_hex(key) not in caplog.text
    assert os.listdir(path.parent) == ["key"]
