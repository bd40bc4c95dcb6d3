"""Copies of stores in other profiles: equal bits, equal files, killed and resumed, refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny_stores import (
    SETTINGS,
    extract_tiny,
    files_below,
    flip_byte,
    make_given,
    readable_content,
    receipts_in,
    repair_tiny,
    states_at_kills,
    write_store,
)
from support.tiny_train_stores import make_tiny_store

from carryon.cache.base.lm_head import widen
from carryon.cache.base.model import Base
from carryon.cache.errors import DamagedStoreError, InputError, SettingMismatchError
from carryon.cache.exchange import recoding
from carryon.cache.exchange.recoding import recode
from carryon.cache.format.quantization import STEPS, from_codes, to_codes
from carryon.cache.format.zarr_metadata import receipt_path, row_path, shard_path
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify
from carryon.train.config import OptimizationSettings, TrainSettings
from carryon.train.data.datasets import open_data

RAW = replace(SETTINGS, profile="raw")


def without_seconds(files: dict[str, bytes]) -> dict[str, object]:
    """Return the files of a store without what differs between two extractions."""
    content: dict[str, object] = {}
    for path, each in files.items():
        content[path] = each
        if path.startswith("units/") and path.count("/") == 1 and path != "units/zarr.json":
            known = json.loads(each)
            content[path] = {name: known[name] for name in known.keys() - {"elapsed_s", "sha256"}}
    return content


@pytest.fixture
def grown(store_folder: Path, tiny_base: Base, store_more_data: Path) -> Path:
    """A store with two parts."""
    extract_tiny(tiny_base, store_more_data, store_folder, append=True)
    return store_folder


def test_a_raw_copy_is_what_extraction_writes_and_recodes_back_to_the_same_files(
    store_folder: Path, tiny_base: Base, store_data: Path, store_tmp: Path
) -> None:
    extract_tiny(tiny_base, store_data, store_tmp / "extracted", store=RAW)

    report = recode(store_folder, out=store_tmp / "raw", profile="raw")
    recode(store_tmp / "raw", out=store_tmp / "back", profile="exact")

    raw, extracted = (files_below(store_tmp / name) for name in ("raw", "extracted"))
    assert without_seconds(raw) == without_seconds(extracted)
    assert files_below(store_tmp / "back") == files_below(store_folder)
    assert report.fingerprint == Store.open(store_tmp / "extracted").fingerprint
    assert report.stored_bytes >= report.raw_bytes
    for name in ("raw", "back"):
        assert verify(store_tmp / name, depth="full").is_complete


def test_a_store_with_parts_is_copied_whole(grown: Path, store_tmp: Path) -> None:
    recode(grown, out=store_tmp / "raw", profile="raw")
    recode(store_tmp / "raw", out=store_tmp / "back", profile="exact")
    assert files_below(store_tmp / "back") == files_below(grown)
    for part in (1, 2):
        ours, theirs = (Store.open(f"{each}#{part}") for each in (store_tmp / "raw", grown))
        for one, other in zip(ours, theirs, strict=True):
            assert one.id == other.id
            assert np.array_equal(one.hidden["final"], other.hidden["final"])
    with pytest.raises(InputError, match="#2: expected a whole store, got a part"):
        recode(f"{grown}#2", out=store_tmp / "part", profile="raw")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_raw_states_are_read_as_written_by_us_and_by_zarr(tmp_path: Path, dtype: str) -> None:
    settings = StoreSettings(taps=["final", "layer.1"], unit_tokens=64, dtype=dtype)  # type: ignore[arg-type]
    write_store(tmp_path / "exact", make_given(settings=settings))
    write_store(tmp_path / "raw", make_given(settings=replace(settings, profile="raw")))
    exact, raw = (Store.open(tmp_path / name) for name in ("exact", "raw"))
    for tap in exact.taps:
        for one, other in zip(raw, exact, strict=True):
            assert one.hidden[tap].dtype == other.hidden[tap].dtype
            assert one.hidden[tap].tobytes() == other.hidden[tap].tobytes()
        states = np.concatenate([unit.hidden[tap] for unit in exact.iter_units()])
        assert np.asarray(raw.as_zarr()[f"hidden/{tap}"]).tobytes() == states.tobytes()


def test_a_change_of_a_raw_chunk_is_found(store_folder: Path, store_tmp: Path) -> None:
    root = store_tmp / "raw"
    recode(store_folder, out=root, profile="raw")
    path = root / shard_path("final", 1)
    before = path.read_bytes()
    flip_byte(path, 500)
    with pytest.raises(DamagedStoreError, match="unit 1 tap final chunk .: checksum does not"):
        Store.open(root).read_unit(1)
    assert "checksum does not match" in verify(root, depth="full").problems[0].text
    chunk = Store.open(root).manifest.rows_per_chunk * Store.open(root).width * 2 + 4
    path.write_bytes(before[chunk : 2 * chunk] + before[chunk:])  # a valid chunk, elsewhere
    with pytest.raises(DamagedStoreError, match="chunk 0: the checksum is valid but differs"):
        Store.open(root).read_unit(1)


@pytest.mark.parametrize("profile", list(STEPS))
def test_a_lossy_copy_holds_the_same_samples_and_the_states_of_its_profile(
    tmp_path: Path, profile: str
) -> None:
    store = Store.open(make_tiny_store(tmp_path / "store", taps=("layer.1", "final")))

    recode(store.root, out=tmp_path / "copy", profile=profile)

    copy = Store.open(tmp_path / "copy")
    assert verify(tmp_path / "copy", depth="full").is_complete
    assert copy.manifest.base == store.manifest.base
    assert copy.manifest.profile_error["final"].keys() >= {"relative_error", "kl", "top1"}
    np.testing.assert_array_equal(copy.sample_held_out, store.sample_held_out)
    for ours, theirs in zip(copy.iter_units(), store.iter_units(), strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        for tap, bits in theirs.hidden.items():
            expected = from_codes(to_codes(widen(bits), step=STEPS[profile]))
            np.testing.assert_array_equal(ours.hidden[tap], expected)
    assert [copy.sample_id(0), copy.sample_id(5)] == [store.sample_id(0), store.sample_id(5)]


def test_a_copy_is_split_and_read_as_the_original_is(tmp_path: Path) -> None:
    store = Store.open(make_tiny_store(tmp_path / "store"))
    recode(store.root, out=tmp_path / "copy", profile="near")
    settings = OptimizationSettings(epochs=2, tokens_per_step=64)
    ours, theirs = (
        open_data([str(root)], TrainSettings.from_options(window_units=2))
        for root in (tmp_path / "copy", store.root)
    )
    assert Store.open(tmp_path / "copy").fingerprint != store.fingerprint
    np.testing.assert_array_equal(ours.split.held_out, theirs.split.held_out)
    for one, other in zip(ours.plan(settings), theirs.plan(settings), strict=True):
        assert [w.units for w in one] == [w.units for w in other]
        assert [[b.tolist() for b in step] for w in one for step in w.steps] == [
            [b.tolist() for b in step] for w in other for step in w.steps
        ]


def test_a_raw_copy_of_a_lossy_store_says_so(
    tiny_base: Base, store_data: Path, store_more_data: Path, store_tmp: Path
) -> None:
    near, root = store_tmp / "near", store_tmp / "raw"
    extract_tiny(tiny_base, store_data, near, store=replace(SETTINGS, profile="near"))
    recode(near, out=root, profile="raw")
    before, after = Store.open(near), Store.open(root)
    assert (after.manifest.rounded_as, after.manifest.is_lossy) == ("near", False)
    assert after.manifest.profile_error == before.manifest.profile_error
    assert not (root / "scale").exists()
    for one, other in zip(after.iter_units(), before.iter_units(), strict=True):
        assert all(np.array_equal(one.hidden[tap], other.hidden[tap]) for tap in before.taps)
    for source in (near, root):
        with pytest.raises(InputError, match="expected a store of exact states.*profile near"):
            recode(source, out=store_tmp / "exact", profile="exact")
    with pytest.raises(SettingMismatchError, match="rounded_as: expected near"):
        extract_tiny(tiny_base, store_more_data, root, store=RAW, append=True)
    with pytest.raises(InputError, match="raw copy of states that the profile near rounded"):
        StoreSettings.from_dict(after.manifest.settings)
    flip_byte(root / shard_path("final", 1), 20)
    with pytest.raises(InputError, match=r"remove units/1.json and run the same carryon recode"):
        repair_tiny(root, tiny_base)
    (root / receipt_path(1)).unlink()
    assert recode(near, out=root, profile="raw").recoded_units == 1
    assert verify(root, depth="full").is_complete


def test_a_recoding_killed_before_any_change_is_resumed_by_the_same_call(
    store_folder: Path, store_tmp: Path
) -> None:
    recode(store_folder, out=store_tmp / "whole", profile="raw")
    expected = readable_content(store_tmp / "whole")
    root, into = store_tmp / "run", store_tmp / "killed"
    into.mkdir()
    copies = states_at_kills(
        root,
        lambda: recode(store_folder, out=root, profile="raw"),
        at=lambda number: number % 31 == 0,
        into=into,
    )
    assert len(copies) >= 4
    for copy in copies:
        before = receipts_in(copy)
        report = recode(store_folder, out=copy, profile="raw")
        after = receipts_in(copy)
        assert {name: after[name] for name in before} == before
        assert report.recoded_units == report.num_units - len(before)
        assert readable_content(copy) == expected
        assert not [path for path in files_below(copy) if ".partial" in path]


def test_a_lossy_recoding_resumes_where_its_error_is_measured_otherwise(
    store_folder: Path, store_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = store_tmp / "near"
    recode(store_folder, out=root, profile="near")
    expected = files_below(root)
    (root / receipt_path(1)).unlink()
    # Another core, or other numbers of threads, add in another order: here, of fewer tokens.
    monkeypatch.setattr(recoding, "_MEASURED_TOKENS", 8)
    assert recode(store_folder, out=root, profile="near").recoded_units == 1
    assert files_below(root) == expected


def test_a_folder_of_other_things_is_not_touched(store_folder: Path, store_tmp: Path) -> None:
    out = store_tmp / "mine"
    out.mkdir()
    (out / ".notes.partial").write_text("x")
    with pytest.raises(InputError, match="expected a new or empty folder.*notes.partial"):
        recode(store_folder, out=out, profile="raw")
    assert files_below(out) == {".notes.partial": b"x"}
    (out / ".notes.partial").unlink()
    assert recode(store_folder, out=out, profile="raw").recoded_units > 0  # empty


def test_what_cannot_be_recoded_is_refused_and_nothing_is_written(
    store_folder: Path, tiny_base: Base, store_data: Path, store_tmp: Path
) -> None:
    before, out = files_below(store_folder), store_tmp / "new"
    with pytest.raises(InputError, match="--profile: expected another than the store's, got ex"):
        recode(store_folder, out=out, profile="exact")
    with pytest.raises(InputError, match="--profile: expected exact, raw, near, compact, got 'x'"):
        recode(store_folder, out=out, profile="x")
    with pytest.raises(InputError, match="--out: expected another folder than the store"):
        recode(store_folder, out=store_folder, profile="raw")
    with pytest.raises(InputError, match="--out: expected another folder than .*, outside it"):
        recode(store_folder, out=store_folder / "raw", profile="raw")
    assert files_below(store_folder) == before
    (store_tmp / "link").symlink_to(store_tmp / "nowhere")
    with pytest.raises(InputError, match=r"link: .* place where none can be made: File exists"):
        recode(store_folder, out=store_tmp / "link", profile="raw")
    extract_tiny(
        tiny_base, store_data, store_tmp / "half", store=replace(SETTINGS, dtype="float16")
    )
    with pytest.raises(InputError, match="expected states in bfloat16 for --profile near"):
        recode(store_tmp / "half", out=out, profile="near")
    with pytest.raises(SettingMismatchError, match="in the profile raw, got another store"):
        recode(store_folder, out=store_tmp / "half", profile="raw")
    assert not out.exists()
    flip_byte(store_folder / row_path("loss_mask", 2), 20)
    with pytest.raises(DamagedStoreError, match="loss_mask/c/2: its SHA-256 differs"):
        recode(store_folder, out=out, profile="raw")
    assert not (out / "zarr.json").exists()
    flip_byte(store_folder / row_path("loss_mask", 2), 20)
    assert files_below(store_folder) == before
