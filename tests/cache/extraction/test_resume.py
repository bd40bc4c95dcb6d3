"""Resuming a store: other settings are refused with name and both values."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bases import CHAT_TEMPLATE, make_tiny_base
from support.tiny_stores import (
    FORWARD,
    SETTINGS,
    extract_tiny,
    files_below,
    readable_content,
    receipts_in,
    write_corpus,
)

from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import InputError, KnownDataError, SettingMismatchError, StoreError
from carryon.cache.extraction.repair import repair
from carryon.cache.format.manifest import read_manifest
from carryon.cache.format.zarr_metadata import copy_path, receipt_path
from carryon.cache.settings import CorpusSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.verify import verify


@dataclass(frozen=True, kw_only=True)
class Changed:
    id: str
    store: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    forward: dict[str, Any] = field(default_factory=dict)
    text: str


CHANGES = [
    Changed(
        id="taps",
        store={"taps": ["final"]},
        text=r"taps: expected \['final', 'layer.1'\], .* got \['final'\]",
    ),
    Changed(
        id="order of taps",
        store={"taps": ["layer.1", "final"]},
        text=r"taps: expected \['final', 'layer.1'\], .* got \['layer.1', 'final'\]",
    ),
    Changed(id="dtype", store={"dtype": "float32"}, text="dtype: expected bfloat16, .* float32"),
    Changed(id="profile", store={"profile": "near"}, text="profile: expected exact, .* got near"),
    Changed(id="seed", store={"seed": 1}, text="seed: expected 0, .* got 1"),
    Changed(
        id="unit_tokens",
        store={"unit_tokens": 128},
        corpus={"max_tokens": 64},  # its default is the unit, which would be named first
        text="unit_tokens: expected 64, .* got 128",
    ),
    Changed(id="mask", corpus={"mask": "all"}, text="mask: expected auto, .* got all"),
    Changed(id="max_tokens", corpus={"max_tokens": 63}, text="max_tokens: expected 64, .* got 63"),
    Changed(id="long", corpus={"long": "split"}, text="long: expected auto, .* got split"),
    Changed(
        id="compute_dtype",
        forward={"compute_dtype": "bfloat16"},
        text="compute_dtype: expected float32, .* got bfloat16",
    ),
    Changed(
        id="attention",
        forward={"attention": "eager"},
        text="attention: expected sdpa, .* got eager",
    ),
]


@pytest.mark.parametrize("case", CHANGES, ids=lambda case: case.id)
def test_another_setting_is_refused_with_both_values_and_changes_nothing(
    tiny_base: Base, tiny_base_folder: Path, store_data: Path, store_folder: Path, case: Changed
) -> None:
    before = files_below(store_folder)
    forward = replace(FORWARD, **case.forward)
    base = load_base(str(tiny_base_folder), forward=forward) if case.forward else tiny_base
    with pytest.raises(SettingMismatchError, match=case.text):
        extract_tiny(
            base,
            store_data,
            store_folder,
            store=replace(SETTINGS, **case.store),
            corpus=CorpusSettings(**case.corpus),
            forward=forward,
        )
    assert files_below(store_folder) == before


@dataclass(frozen=True, kw_only=True)
class OtherBase:
    id: str
    change: Callable[[Path], None]
    setting: str


def other_weights(folder: Path) -> None:
    make_tiny_base(folder, seed=1)


def other_architecture(folder: Path) -> None:
    make_tiny_base(folder, "qwen2")


def other_template(folder: Path) -> None:
    place = folder / "chat_template.jinja"
    assert CHAT_TEMPLATE in place.read_text()
    place.write_text(CHAT_TEMPLATE.replace("assistant", "model"))


def other_tokenizer(folder: Path) -> None:
    place = folder / "tokenizer.json"
    text = place.read_text()
    assert '"add_prefix_space":false' in text.replace(" ", "")
    place.write_text(text.replace('"add_prefix_space": false', '"add_prefix_space": true'))


def other_norm(folder: Path) -> None:
    place = folder / "config.json"
    place.write_text(place.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def other_rope(folder: Path) -> None:
    place = folder / "config.json"
    text = place.read_text()
    assert '"rope_theta": 10000.0' in text
    place.write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 500.0'))


@pytest.mark.parametrize(
    "case",
    [
        OtherBase(id="weights", change=other_weights, setting="base.weights_sha256"),
        OtherBase(id="architecture", change=other_architecture, setting="base.architecture"),
        OtherBase(id="template", change=other_template, setting="base.chat_template_sha256"),
        OtherBase(id="tokenizer", change=other_tokenizer, setting="base.tokenizer_sha256"),
        OtherBase(id="epsilon of the norm", change=other_norm, setting="base.config_sha256"),
        OtherBase(id="rope", change=other_rope, setting="base.config_sha256"),
    ],
    ids=lambda case: case.id,
)
def test_another_base_is_refused_by_the_digest_that_differs(
    tiny_base_folder: Path, store_data: Path, store_folder: Path, tmp_path: Path, case: OtherBase
) -> None:
    before = files_below(store_folder)
    folder = Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))
    case.change(folder)
    with pytest.raises(SettingMismatchError, match=f"{case.setting}: expected .*, got"):
        extract_tiny(str(folder), store_data, store_folder)
    assert files_below(store_folder) == before


def test_the_base_may_have_moved(
    tiny_base_folder: Path, store_data: Path, store_folder: Path, tmp_path: Path
) -> None:
    expected = readable_content(store_folder)
    moved = shutil.copytree(tiny_base_folder, tmp_path / "elsewhere")
    (store_folder / receipt_path(1)).unlink()
    report = extract_tiny(str(moved), store_data, store_folder)
    assert (report.computed_units, report.is_finished) == (1, True)
    assert readable_content(store_folder) == expected


def test_other_data_are_refused_and_append_is_named(
    tiny_base: Base, store_more_data: Path, store_folder: Path
) -> None:
    before = files_below(store_folder)
    fingerprint = read_manifest(store_folder).parts[0].fingerprint
    with pytest.raises(
        SettingMismatchError,
        match=f"data: expected .* fingerprint {fingerprint[:12]}, got .* with --append",
    ):
        extract_tiny(tiny_base, store_more_data, store_folder)
    assert files_below(store_folder) == before


def test_running_a_finished_extraction_again_computes_and_writes_nothing(
    tiny_base: Base, store_data: Path, store_folder: Path
) -> None:
    before, receipts = files_below(store_folder), receipts_in(store_folder)
    report = extract_tiny(tiny_base, store_data, store_folder)
    assert (report.computed_units, report.computed_tokens, report.is_finished) == (0, 0, True)
    assert files_below(store_folder) == before
    assert receipts_in(store_folder) == receipts


def test_only_units_without_a_receipt_are_computed(
    tiny_base: Base, store_data: Path, store_folder: Path
) -> None:
    expected = readable_content(store_folder)
    for unit in (0, 2):
        (store_folder / receipt_path(unit)).unlink()
    (store_folder / "hidden/final/c/2/0").write_bytes(b"leftover of a killed writer")
    kept = receipts_in(store_folder)
    report = extract_tiny(tiny_base, store_data, store_folder)
    assert report.computed_units == 2
    after = receipts_in(store_folder)
    assert {name: after[name] for name in kept} == kept
    assert readable_content(store_folder) == expected


def test_a_unit_with_a_damaged_receipt_is_computed_again(
    tiny_base: Base, store_data: Path, store_folder: Path
) -> None:
    expected = readable_content(store_folder)
    (store_folder / receipt_path(1)).write_text("{}")
    assert extract_tiny(tiny_base, store_data, store_folder).computed_units == 1
    assert readable_content(store_folder) == expected


def test_receipts_without_a_manifest_are_refused(
    tiny_base: Base, store_more_data: Path, store_folder: Path
) -> None:
    for path in ("zarr.json", copy_path("zarr.json")):
        (store_folder / path).unlink()
    before = files_below(store_folder)
    with pytest.raises(StoreError, match="expected a new store, got receipts of one whose manif"):
        extract_tiny(tiny_base, store_more_data, store_folder)
    assert files_below(store_folder) == before


# Append


@pytest.fixture
def appended(tiny_base: Base, store_more_data: Path, store_folder: Path) -> Path:
    extract_tiny(tiny_base, store_more_data, store_folder, append=True)
    return store_folder


def test_append_keeps_every_existing_unit_receipt_and_sample(
    store_original: Path, appended: Path
) -> None:
    old, new = readable_content(store_original), readable_content(appended)
    for name in (name for name in old if "/" in name):
        assert new[name] == old[name]
    assert new["ids"][: len(old["ids"])] == old["ids"]
    for before, after in zip(old["places"], new["places"], strict=True):
        assert after[: len(before)] == before
    assert new["fingerprint"] != old["fingerprint"]
    old_receipts, new_receipts = receipts_in(store_original), receipts_in(appended)
    assert len(new_receipts) > len(old_receipts)
    for name, (content, _) in old_receipts.items():
        assert new_receipts[name][0] == content


def test_a_copy_of_the_manifest_from_before_an_append_is_named_and_restored(
    store_original: Path, appended: Path
) -> None:
    copy = appended / copy_path("zarr.json")
    expected = copy.read_bytes()
    copy.write_bytes((store_original / copy_path("zarr.json")).read_bytes())
    [problem] = verify(appended).problems
    assert problem.path == copy_path("zarr.json")
    assert repair(appended).is_complete
    assert copy.read_bytes() == expected


def test_appended_samples_are_read_by_id(appended: Path, store_original: Path) -> None:
    store, old = Store.open(appended), Store.open(store_original)
    assert store.num_samples == old.num_samples + 8
    assert store.num_tokens == int(store.sample_lengths.sum())
    index = store.index_of("text-15")
    assert index >= old.num_samples
    rows = store.read_sample("text-15")
    assert len(rows.tokens) == len(rows.hidden["final"]) == store.sample_lengths[index]


def test_a_second_append_of_the_same_data_is_refused_and_changes_nothing(
    tiny_base: Base, store_more_data: Path, appended: Path
) -> None:
    before = files_below(appended)
    with pytest.raises(KnownDataError, match="got a file equal to more.jsonl of part 2"):
        extract_tiny(tiny_base, store_more_data, appended, append=True)
    assert files_below(appended) == before


def test_either_part_of_an_appended_store_can_be_resumed(
    tiny_base: Base, store_data: Path, store_more_data: Path, appended: Path
) -> None:
    expected = readable_content(appended)
    last = Store.open(appended).num_units - 1
    for data in (store_data, store_more_data):
        for unit in (0, last):
            (appended / receipt_path(unit)).unlink()
        assert extract_tiny(tiny_base, data, appended).computed_units == 2
        assert readable_content(appended) == expected


def test_a_sample_with_a_known_id_is_not_appended(
    tiny_base: Base, store_folder: Path, tmp_path: Path
) -> None:
    before = files_below(store_folder)
    data = write_corpus(tmp_path / "again.jsonl", num_samples=3, first=11)  # text-11 is there
    with pytest.raises(InputError, match="sample 'text-11': a sample with this id is in the store"):
        extract_tiny(tiny_base, data, store_folder, append=True)
    assert files_below(store_folder) == before


def test_an_id_too_long_for_the_store_is_not_appended(
    tiny_base: Base, store_folder: Path, tmp_path: Path
) -> None:
    before = files_below(store_folder)
    data = tmp_path / "long.jsonl"
    data.write_text('{"id": "%s", "text": "a text with a long id"}\n' % ("x" * 100))
    with pytest.raises(InputError, match="keeps 64 bytes for an id, got one that needs 112"):
        extract_tiny(tiny_base, data, store_folder, append=True)
    assert files_below(store_folder) == before


def test_append_with_another_setting_is_refused(
    tiny_base: Base, store_more_data: Path, store_folder: Path
) -> None:
    before = files_below(store_folder)
    with pytest.raises(SettingMismatchError, match="seed: expected 0, .* got 3"):
        extract_tiny(
            tiny_base,
            store_more_data,
            store_folder,
            store=replace(SETTINGS, seed=3),
            append=True,
        )
    assert files_below(store_folder) == before


def test_append_needs_a_store(tiny_base: Base, store_data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a store to append to, got none"):
        extract_tiny(tiny_base, store_data, tmp_path / "none", append=True)


def test_a_store_that_is_open_stays_readable_while_samples_are_appended(
    tiny_base: Base, store_more_data: Path, store_original: Path, store_folder: Path
) -> None:
    expected = readable_content(store_original)
    store = Store.open(store_folder)
    extract_tiny(tiny_base, store_more_data, store_folder, append=True)
    # Tables are read only now, from files that have grown.
    assert [store.sample_id(sample) for sample in range(store.num_samples)] == expected["ids"]
    assert store.sample_starts.tolist() == expected["places"][0]
    assert [unit.unit for unit in store.iter_units()] == sorted(store.finished_units)


def test_a_file_that_the_store_holds_is_refused_by_name_and_changes_nothing(
    tiny_base: Base, store_folder: Path, store_data: Path, store_tmp: Path
) -> None:
    same = Path(shutil.copy(store_data, store_tmp / "april.jsonl"))
    more = write_corpus(store_tmp / "more.jsonl", num_samples=3, first=12)
    before = files_below(store_folder)
    with pytest.raises(
        InputError,
        match=r"^april.jsonl: expected data that the store .* does not hold yet, got a "
        r"file equal to texts.jsonl of part 1. Fix: leave it out$",
    ):
        extract_tiny(tiny_base, [more, same], store_folder, append=True)
    assert files_below(store_folder) == before
    extract_tiny(tiny_base, more, store_folder, append=True)
    data = write_corpus(store_tmp / "last.jsonl", num_samples=3, first=15)
    with pytest.raises(InputError, match="got a file equal to more.jsonl of part 2"):
        extract_tiny(tiny_base, [data, more], store_folder, append=True)


def test_a_corpus_that_the_store_holds_as_a_whole_resumes_until_it_is_finished(
    tiny_base: Base, store_folder: Path, store_data: Path, store_tmp: Path
) -> None:
    same = Path(shutil.copy(store_data, store_tmp / "texts.jsonl"))
    (store_folder / "units" / "0.json").unlink()
    assert extract_tiny(tiny_base, same, store_folder, append=True).computed_units == 1
    with pytest.raises(KnownDataError, match="got a file equal to texts.jsonl of part 1"):
        extract_tiny(tiny_base, same, store_folder, append=True)
