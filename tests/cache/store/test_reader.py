"""Stores written and read by this package and by zarr-python, whole and in parts."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import zarr
from support.tiny_stores import (
    SETTINGS,
    UNIT_TOKENS,
    WIDTH,
    Given,
    audit,
    files_below,
    make_given,
    states_of,
    write_store,
)

from carryon.cache.errors import (
    DamagedStoreError,
    InputError,
    MissingError,
    StoreError,
    UnfinishedStoreError,
)
from carryon.cache.files.atomic import write_file
from carryon.cache.format.quantization import bfloat16_bits
from carryon.cache.format.zarr_metadata import receipt_path, shard_path
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_reader import CopyRange


@dataclass(frozen=True, kw_only=True)
class Kind:
    id: str
    profile: Literal["exact", "raw", "near", "compact"] = "exact"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @property
    def settings(self) -> StoreSettings:
        return StoreSettings(
            taps=["final", "layer.1"],
            unit_tokens=UNIT_TOKENS,
            profile=self.profile,
            dtype=self.dtype,
        )


EXACT = [
    Kind(id="bfloat16"),
    Kind(id="float16", dtype="float16"),
    Kind(id="float32", dtype="float32"),
    Kind(id="raw", profile="raw"),
    Kind(id="raw-float16", profile="raw", dtype="float16"),
    Kind(id="raw-float32", profile="raw", dtype="float32"),
]
LOSSY = [Kind(id="near", profile="near"), Kind(id="compact", profile="compact")]


def named(kinds: list[Kind]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.id)


def rows_of(given: Given, tap: str, unit: int) -> np.ndarray[Any, Any]:
    size = given.settings.unit_tokens
    return given.hidden[tap][unit * size : (unit + 1) * size]


@named(EXACT)
def test_reading_returns_the_written_values(store_tmp: Path, kind: Kind) -> None:
    given = make_given(settings=kind.settings)
    write_store(store_tmp / "store", given)
    store = Store.open(store_tmp / "store")
    assert store.num_units >= 4
    for unit in store.iter_units():
        for tap in store.taps:
            rows = rows_of(given, tap, unit.unit)
            expected = bfloat16_bits(rows) if kind.dtype == "bfloat16" else rows.astype(kind.dtype)
            assert unit.hidden[tap].dtype == expected.dtype
            np.testing.assert_array_equal(unit.hidden[tap], expected)
        for sample in unit.samples:
            original = given.samples[int(given.plan.order[sample])]
            rows_within = unit.rows_of(sample)
            np.testing.assert_array_equal(unit.tokens[rows_within], original.tokens)
            np.testing.assert_array_equal(unit.loss_mask[rows_within], original.loss_mask)
            np.testing.assert_array_equal(unit.char_end[rows_within], original.char_end)
            assert store.sample_id(sample) == original.id


@named(LOSSY)
def test_lossy_states_are_within_the_error_that_the_store_states(
    store_tmp: Path, kind: Kind
) -> None:
    given = make_given(settings=kind.settings)
    manifest = write_store(store_tmp / "store", given)
    for unit in Store.open(store_tmp / "store").iter_units():
        for tap, stored in unit.hidden.items():
            expected = rows_of(given, tap, unit.unit)
            is_used = expected.any(axis=1)
            made = states_of(stored)
            assert not made[~is_used].any()
            error = np.linalg.norm((made - expected)[is_used], axis=1)
            error /= np.linalg.norm(expected[is_used], axis=1)
            stated = manifest.profile_error[tap]["relative_error"]
            assert 0.5 * stated < np.median(error) < 1.5 * stated, tap


@named([*EXACT, *LOSSY])
def test_the_same_states_give_the_same_files(store_tmp: Path, kind: Kind) -> None:
    for name in ("one", "two"):
        write_store(store_tmp / name, make_given(settings=kind.settings))
    assert files_below(store_tmp / "one") == files_below(store_tmp / "two")


@named([*EXACT, *LOSSY])
def test_zarr_python_reads_every_array_as_we_do(store_tmp: Path, kind: Kind) -> None:
    given = make_given(settings=kind.settings)
    write_store(store_tmp / "store", given)
    store = Store.open(store_tmp / "store")
    group: Any = zarr.open_group(store_tmp / "store", mode="r")
    size = UNIT_TOKENS
    for unit in store.iter_units():
        rows = slice(unit.unit * size, (unit.unit + 1) * size)
        for name in ("tokens", "loss_mask", "char_end"):
            np.testing.assert_array_equal(group[name][rows], getattr(unit, name))
        for tap in store.taps:
            raw = group[f"hidden/{tap}"]
            assert raw.attrs["logical_dtype"] == kind.dtype
            if kind.profile in ("exact", "raw"):
                np.testing.assert_array_equal(raw[rows], unit.hidden[tap])
                continue
            # The formula of quantization.py, computed here.
            scaled = (raw[rows].astype(np.float32) - 0x8080) * group[f"scale/token/{tap}"][rows][
                :, None
            ]
            made = scaled * group[f"scale/channel/{tap}"][unit.unit]
            np.testing.assert_array_equal(bfloat16_bits(made), unit.hidden[tap])
    np.testing.assert_array_equal(group["samples/start"][:], store.sample_starts)
    np.testing.assert_array_equal(group["samples/length"][:], store.sample_lengths)
    np.testing.assert_array_equal(group["samples/held_out"][:], store.sample_held_out)
    ids = [bytes(row).rstrip(b"\0").decode() for row in group["samples/id"][:]]
    assert ids == [store.sample_id(sample) for sample in range(store.num_samples)]
    np.testing.assert_array_equal(group["head/lm_head"][:], store.head().weight)
    np.testing.assert_array_equal(group["head/norm_weight"][:], store.head().norm.weight)
    tokens = [sum(unit.lengths.tolist()) for unit in store.iter_units()]
    assert group["units"][:].tolist() == tokens


PLAIN_ZARR = """
import sys, warnings
warnings.simplefilter("error")
import numpy as np, zarr
group = zarr.open_group(sys.argv[1], mode="r")
names = []
def walk(group, prefix):
    for name, member in sorted(group.members()):
        if isinstance(member, zarr.Group):
            walk(member, prefix + name + "/")
        else:
            names.append(prefix + name)
            member[:]
walk(group, "")
states = group["hidden/final"][:64].astype(np.uint32) << 16
assert group["hidden/final"].attrs["logical_dtype"] == "bfloat16"
print(" ".join(names))
print(repr(float(states.view(np.float32).astype(np.float64).sum())))
assert not [name for name in sys.modules if name.startswith("carryon")]
"""


def test_a_process_without_this_package_reads_a_store_without_a_warning(store_tmp: Path) -> None:
    write_store(store_tmp / "store", make_given())
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_ZARR, str(store_tmp / "store")],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    names, total = done.stdout.splitlines()
    assert set(names.split()) == {
        *("tokens", "loss_mask", "char_end", "units", "hidden/final", "hidden/layer.1"),
        *(f"samples/{name}" for name in ("start", "length", "held_out", "id", "group", "role")),
        *("head/lm_head", "head/norm_weight", "probe/rows", "probe/top_ids", "probe/top_logits"),
        *(f"probe/states/{tap}" for tap in ("final", "layer.1", "prenorm")),
    }
    unit = Store.open(store_tmp / "store").read_unit(0)
    assert float(total) == states_of(unit.hidden["final"]).astype(np.float64).sum()


@named(EXACT)
def test_the_reader_reads_what_zarr_python_wrote(store_tmp: Path, kind: Kind) -> None:
    given = make_given(settings=kind.settings)
    write_store(store_tmp / "ours", given)
    shutil.copytree(store_tmp / "ours", store_tmp / "theirs")
    ours = Store.open(store_tmp / "ours")
    with zarr.config.set({"array.write_empty_chunks": True}):
        rewrite_with_zarr(ours, store_tmp / "theirs")
    # Not only the same numbers, the same bytes: the receipts still fit.
    assert files_below(store_tmp / "theirs") == files_below(store_tmp / "ours")
    theirs = Store.open(store_tmp / "theirs")
    for unit in theirs.iter_units():
        expected = ours.read_unit(unit.unit)
        np.testing.assert_array_equal(unit.tokens, expected.tokens)
        for tap in ours.taps:
            np.testing.assert_array_equal(unit.hidden[tap], expected.hidden[tap])


def test_a_chunk_of_zeros_that_zarr_python_left_out_is_reported_as_missing(
    store_tmp: Path,
) -> None:
    # Its default: then "lost" and "zero" look alike.
    write_store(store_tmp / "store", make_given())
    store = Store.open(store_tmp / "store")
    used = {unit.unit: int(unit.lengths.sum()) for unit in store.iter_units()}
    unit = min(used, key=lambda unit: used[unit])
    assert used[unit] <= UNIT_TOKENS - 16  # so its last chunk is all zeros
    rewrite_with_zarr(store, store.root)
    with pytest.raises(DamagedStoreError, match=f"hidden/final/c/{unit}/0: expected"):
        store.read_unit(unit)


def rewrite_with_zarr(store: Store, root: Path) -> None:
    """Write all rows of `store` into `root` with zarr-python, by the array documents there."""
    units = list(store.iter_units())
    arrays = {tap: np.concatenate([unit.hidden[tap] for unit in units]) for tap in store.taps}
    group: Any = zarr.open_group(root, mode="r+")
    for tap, rows in arrays.items():
        shutil.rmtree(root / "hidden" / tap / "c")
        group[f"hidden/{tap}"][:] = rows
    for name in ("tokens", "loss_mask", "char_end"):
        shutil.rmtree(root / name / "c")
        group[name][:] = np.concatenate([getattr(unit, name) for unit in units])


# Parts of a store


@pytest.fixture
def given() -> Given:
    return make_given()


@pytest.fixture
def store(store_tmp: Path, given: Given) -> Store:
    write_store(store_tmp / "store", given)
    return Store.open(store_tmp / "store")


def test_samples_are_read_by_index_and_by_id(store: Store, given: Given) -> None:
    for index in range(store.num_samples):
        original = given.samples[int(given.plan.order[index])]
        assert store.index_of(original.id) == index
        rows, same = store.read_sample(index), store.read_sample(original.id)
        assert (rows.index, same.index) == (index, index)
        first = int(given.plan.start[index])
        expected = bfloat16_bits(given.hidden["final"][first : first + len(original.tokens)])
        for found in (rows, same):
            np.testing.assert_array_equal(found.tokens, original.tokens)
            np.testing.assert_array_equal(found.loss_mask, original.loss_mask)
            np.testing.assert_array_equal(found.char_end, original.char_end)
            np.testing.assert_array_equal(found.hidden["final"], expected)


def test_any_token_range_of_a_sample_is_read_over_the_edges_of_chunks(store: Store) -> None:
    # Units of 64 rows in chunks of 16: a sample of 17 tokens or more lies in two chunks at least.
    index = int(np.argmax(store.sample_lengths))
    whole = store.read_sample(index)
    length = len(whole.tokens)
    assert length >= 17
    for start in range(0, length + 1, 3):
        for stop in range(start, length + 1):
            part = store.read_sample(index, start=start, stop=stop)
            np.testing.assert_array_equal(part.tokens, whole.tokens[start:stop])
            for tap in store.taps:
                assert part.hidden[tap].shape == (stop - start, WIDTH)
                np.testing.assert_array_equal(part.hidden[tap], whole.hidden[tap][start:stop])


def test_one_tap_is_read_without_touching_the_others(store: Store, given: Given) -> None:
    for unit in range(1, store.num_units):  # unit 0 is needed for the probe
        (store.root / shard_path("layer.1", unit)).unlink()
    found = Store.open(store.root).read_unit(1, taps=["final"])
    assert list(found.hidden) == ["final"]
    np.testing.assert_array_equal(
        found.hidden["final"], bfloat16_bits(given.hidden["final"][UNIT_TOKENS : 2 * UNIT_TOKENS])
    )
    rows = store.read_sample(store.unit_samples(1).start, taps=["final"])
    assert list(rows.hidden) == ["final"]


def test_units_cover_every_sample_once_and_in_order(store: Store) -> None:
    seen = [sample for unit in store.iter_units() for sample in unit.samples]
    assert seen == list(range(store.num_samples))
    assert store.num_tokens == int(store.sample_lengths.sum())


def test_held_out_samples_share_no_unit_with_others(store: Store) -> None:
    kinds = [
        {int(store.sample_held_out[sample]) for sample in store.unit_samples(unit)}
        for unit in range(store.num_units)
    ]
    assert {0} in kinds
    assert {1} in kinds
    assert {0, 1} not in kinds


def test_rows_after_the_last_sample_of_a_unit_are_zero(store: Store) -> None:
    num_unused = 0
    for unit in store.iter_units():
        used = int(unit.lengths.sum())
        assert unit.rows_of(unit.samples[-1]).stop == used
        num_unused += UNIT_TOKENS - used
        for name in ("tokens", "loss_mask", "char_end"):
            assert not getattr(unit, name)[used:].any()
        for states in unit.hidden.values():
            assert not states[used:].any()
    assert num_unused > 0


def test_a_unit_can_be_read_without_taps(store: Store) -> None:
    assert store.read_unit(0, taps=[]).hidden == {}


@dataclass(frozen=True, kw_only=True)
class Refused:
    id: str
    arguments: dict[str, Any]
    text: str


@pytest.mark.parametrize(
    "case",
    [
        Refused(id="index", arguments={"sample": 20}, text="a sample from 0 to 19, got 20"),
        Refused(id="negative", arguments={"sample": -1}, text="a sample from 0 to 19, got -1"),
        Refused(id="id", arguments={"sample": "nobody"}, text="no sample with the id 'nobody'"),
        Refused(
            id="a part of an id", arguments={"sample": "sample-0"}, text="no sample with the id"
        ),
        Refused(id="long id", arguments={"sample": "x" * 300}, text="no sample with the id 'xxx"),
        Refused(id="start", arguments={"sample": 0, "start": -1}, text="tokens between 0 and"),
        Refused(id="stop", arguments={"sample": 0, "stop": 999}, text="got 0 to 999"),
        Refused(
            id="tap",
            arguments={"sample": 0, "taps": ["prenorm"]},
            text="tap 'prenorm' was not stored: it has final, layer.1",
        ),
    ],
    ids=lambda case: case.id,
)
def test_missing_samples_tokens_and_taps_are_refused_by_name(store: Store, case: Refused) -> None:
    with pytest.raises(InputError, match=case.text):
        store.read_sample(**case.arguments)


def test_units_and_ids_that_do_not_exist_are_refused(store: Store) -> None:
    with pytest.raises(InputError, match=f"a unit from 0 to {store.num_units - 1}, got 99"):
        store.read_unit(99)
    with pytest.raises(InputError, match="a sample from 0 to 19, got 20"):
        store.sample_id(20)


def test_a_file_given_for_a_store_is_told_what_makes_one(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}")
    with pytest.raises(
        StoreError, match=r"expected the folder of a store, got a file\. Fix: carry"
    ):
        Store.open(tmp_path / "chats.jsonl")


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="expected a store.*carryon extract"):
        Store.open(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_store_is_refused_unless_allowed(store: Store) -> None:
    missing = store.num_units - 1
    (store.root / receipt_path(missing)).unlink()
    with pytest.raises(UnfinishedStoreError, match=f"1 of {store.num_units} units are not extr"):
        Store.open(store.root)
    part = Store.open(store.root, allow_unfinished=True)
    assert [unit.unit for unit in part.iter_units()] == list(range(missing))
    with pytest.raises(UnfinishedStoreError, match=f"unit {missing} is not extracted"):
        part.read_unit(missing)
    with pytest.raises(UnfinishedStoreError, match=f"unit {missing} is not extracted"):
        part.read_sample(part.num_samples - 1)


def test_opening_reads_as_many_files_of_a_large_store_as_of_a_small_one(store_tmp: Path) -> None:
    num_opened = {}
    for num_samples in (20, 200):
        root = store_tmp / str(num_samples)
        write_store(root, make_given(settings=SETTINGS, num_samples=num_samples))
        num_units, opened = opened_by_opening(root)
        num_opened[num_units] = sum(path.startswith(str(root)) for path in opened)
    small, large = sorted(num_opened)
    assert large > 5 * small
    # The tables are cut in chunks of 8 rows here, and the probe looks at rows of five head
    # chunks at most: only the chance of which ones may differ.
    assert abs(num_opened[large] - num_opened[small]) <= 4, num_opened


def opened_by_opening(root: Path) -> tuple[int, list[str]]:
    """Return the units of a store, and the files that opening it opens."""
    opened: list[str] = []
    with audit(lambda event, arguments: opened.append(str(arguments[0])), ("open",)):
        store = Store.open(root)
    return store.num_units, opened


def test_arrays_in_use_keep_their_values_while_others_are_read(store: Store) -> None:
    # Memory is used again once nobody holds an array: a view of any kind must hold it.
    held: list[tuple[torch.Tensor, bytes]] = []
    for unit in range(store.num_units):
        states = store.read_unit(unit).hidden["final"][3:9, ::2]
        tensor = torch.from_numpy(states).view(torch.bfloat16)[1:]
        held.append((tensor, states[1:].tobytes()))
        del states
        for other in range(store.num_units):
            store.read_unit(other)
            store.read_sample(store.unit_samples(other).start)
    for tensor, expected in held:
        assert tensor.contiguous().view(torch.uint16).numpy().tobytes() == expected


# The interface of a library user


def test_samples_are_reached_by_index_by_id_and_in_order(store: Store) -> None:
    samples = list(store)
    assert len(samples) == len(store) == 20
    for index, sample in enumerate(samples):
        assert (sample.index, sample.id) == (index, store.sample_id(index))
        for same in (store[index], store[index - 20], store[sample.id], store[np.int64(index)]):
            assert (same.index, same.id) == (sample.index, sample.id)
            np.testing.assert_array_equal(same.tokens, sample.tokens)
            np.testing.assert_array_equal(same.loss_mask, sample.loss_mask)
            np.testing.assert_array_equal(same.char_end, sample.char_end)
            for tap in store.taps:
                np.testing.assert_array_equal(same.hidden[tap], sample.hidden[tap])


def test_iterating_reads_each_unit_once(store: Store) -> None:
    opened: list[str] = []
    with audit(lambda event, arguments: opened.append(str(arguments[0])), ("open",)):
        for _ in store:
            pass
    for unit in range(store.num_units):
        assert opened.count(str(store.root / shard_path("final", unit))) == 1


def test_samples_that_do_not_exist_are_refused_by_number_and_by_name(store: Store) -> None:
    for index in (20, -21):
        with pytest.raises(IndexError, match=f"a sample from -20 to 19, got {index}"):
            store[index]
    with pytest.raises(InputError, match="no sample with the id 'nobody'"):
        store["nobody"]


def test_iterating_over_an_unfinished_store_yields_what_is_finished(store: Store) -> None:
    (store.root / receipt_path(1)).unlink()
    part = Store.open(store.root, allow_unfinished=True)
    missing = store.unit_samples(1)
    expected = [index for index in range(len(store)) if index not in missing]
    assert [sample.index for sample in part] == expected
    with pytest.raises(UnfinishedStoreError, match="unit 1 is not extracted"):
        part[missing[0]]


def test_repr_names_path_size_states_and_base(store: Store) -> None:
    assert repr(store) == (
        f"<Store {str(store.root)!r}: 20 samples, {store.num_tokens} tokens in {store.num_units} "
        "units; taps final layer.1, 16 x bfloat16; base tiny>"
    )


@named([*EXACT, *LOSSY])
def test_torch_tensors_are_of_the_stored_type_and_share_memory(store_tmp: Path, kind: Kind) -> None:
    write_store(store_tmp / "store", make_given(settings=kind.settings))
    plain = Store.open(store_tmp / "store")
    tensors = Store.open(store_tmp / "store", as_torch=True)
    unit = plain.read_unit(0)
    for ours in (unit.as_torch(), tensors.read_unit(0)):
        assert (ours.tokens.dtype, ours.loss_mask.dtype) == (torch.int32, torch.uint8)
        assert ours.hidden["final"].dtype == getattr(torch, kind.dtype)
        assert ours.hidden["final"].shape == (UNIT_TOKENS, WIDTH)
        np.testing.assert_array_equal(ours.hidden["final"].float(), unit.float32("final"))
        assert (ours.samples, ours.starts.tolist()) == (unit.samples, unit.starts.tolist())
    assert unit.as_torch().hidden["final"].data_ptr() == unit.hidden["final"].ctypes.data
    assert unit.as_torch().tokens.data_ptr() == unit.tokens.ctypes.data
    for sample, same, rows in zip(tensors, plain, map(tensors.read_sample, range(20)), strict=True):
        assert (sample.id, rows.id) == (same.id, same.id)
        for found in (sample, rows):
            assert isinstance(found.tokens, torch.Tensor)
            np.testing.assert_array_equal(found.tokens, same.tokens)
            np.testing.assert_array_equal(found.hidden["final"].float(), same.float32("final"))
        assert same.float32("final").dtype == np.float32


def test_zarr_python_opens_a_store_read_only(store: Store) -> None:
    group: Any = store.as_zarr()
    np.testing.assert_array_equal(group["tokens"][:UNIT_TOKENS], store.read_unit(0).tokens)
    with pytest.raises(ValueError, match="read-only|read only"):
        group["tokens"][:1] = 0


def test_a_receipt_is_parsed_once_for_all_taps_and_again_when_it_has_changed(store: Store) -> None:
    store = Store.open(store.root)
    path, opened = str(store.root / receipt_path(1)), []
    with audit(lambda event, arguments: opened.append(str(arguments[0])), ("open",)):
        for _ in range(2):
            store.read_unit(1)
            for tap in store.taps:
                out = np.empty((4, WIDTH), dtype=store.states_dtype)
                store.copy_states(1, tap, [CopyRange(first=0, stop=4, to=out)])
    assert opened.count(path) == 1
    other = (store.root / receipt_path(2)).read_bytes()
    write_file(store.root / receipt_path(1), other)
    with pytest.raises(DamagedStoreError, match="expected the receipt of unit 1"):
        store.read_unit(1)


READING = """
import sys
before = set(sys.modules)
from carryon.cache import Store
store = Store.open(sys.argv[1])
for sample in store: pass
store[0], store[store.sample_id(1)], store.head(), repr(store)
names = {name.partition(".")[0] for name in set(sys.modules) - before}
places = {name: getattr(sys.modules[name], "__file__", None) or "" for name in names}
print(*(name for name, place in places.items() if "site-packages" in place))
"""


def test_reading_needs_numpy_numcodecs_and_google_crc32c(store: Store) -> None:
    done = subprocess.run(
        [sys.executable, "-c", READING, str(store.root)], capture_output=True, text=True, check=True
    )
    expected = {"numpy", "numcodecs", "google_crc32c", "typing_extensions"}
    by_numcodecs = {"msgpack"}  # for a codec of its own, where it is installed
    assert set(done.stdout.split()) <= expected | by_numcodecs
