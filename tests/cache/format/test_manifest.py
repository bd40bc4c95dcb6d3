"""The manifest detects every changed byte; its fingerprint depends on the content only."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny_stores import flip_byte, make_given, plan_given, small_pieces

from carryon.cache.errors import DamagedStoreError, StoreError
from carryon.cache.files.documents import digest_of, json_bytes
from carryon.cache.format.manifest import Manifest, parse_manifest, read_manifest
from carryon.cache.format.receipt import origin_of
from carryon.cache.format.zarr_metadata import group_document


@pytest.fixture
def root(store_tmp: Path) -> Path:
    with small_pieces():
        plan_given(store_tmp / "store", make_given())
    return store_tmp / "store"


@pytest.fixture
def manifest(root: Path) -> Manifest:
    return read_manifest(root)


def test_reading_returns_the_written_values(manifest: Manifest) -> None:
    document = group_document({"carryon": manifest.to_dict()})
    assert parse_manifest(json_bytes(document), name="x", is_mirrored=False) == manifest


def test_a_changed_byte_anywhere_is_detected(root: Path) -> None:
    path = root / "zarr.json"
    content = path.read_bytes()
    for offset in range(0, len(content), 23):
        flip_byte(path, offset, mask=1)
        with pytest.raises(DamagedStoreError, match="zarr.json"):
            read_manifest(root)
        path.write_bytes(content)


def test_a_manifest_edited_by_hand_is_detected(root: Path) -> None:
    path = root / "zarr.json"
    document = json.loads(path.read_bytes())
    document["attributes"]["carryon"]["settings"]["seed"] = 5
    path.write_bytes(json_bytes(document))
    with pytest.raises(DamagedStoreError, match="does not match its own digest"):
        read_manifest(root)


def test_the_same_values_in_another_form_are_detected(root: Path) -> None:
    path = root / "zarr.json"
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps(document))
    with pytest.raises(DamagedStoreError, match="not in the form it was written in"):
        read_manifest(root)
    document["zarr_format"] = 2
    path.write_bytes(json_bytes(document))
    with pytest.raises(DamagedStoreError, match="not in the form it was written in"):
        read_manifest(root)


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"width": None, "fingerprint": "0" * 64},
        {"fingerprint": "0" * 64},
    ],
    ids=["unknown key", "another width", "another fingerprint"],
)
def test_a_recomputed_digest_does_not_hide_changed_values(
    manifest: Manifest, change: dict[str, Any]
) -> None:
    values = manifest.to_dict() | change
    values.pop("sha256")
    values["sha256"] = digest_of(values)
    with pytest.raises(DamagedStoreError, match="x: the manifest"):
        Manifest.from_dict(values, name="x")


def test_another_group_counts_as_damaged_only_beside_a_copy_of_a_manifest() -> None:
    content = json_bytes(group_document({"theirs": 1}))
    with pytest.raises(StoreError, match="not a store of carryon") as caught:
        parse_manifest(content, name="x", is_mirrored=False)
    assert type(caught.value) is StoreError
    with pytest.raises(DamagedStoreError, match="not a store of carryon"):
        parse_manifest(content, name="x", is_mirrored=True)


CONTENT = [
    {"settings": {"seed": 1}},
    {"forward": {"attention": "eager"}},
    {"corpus": {"mask": "all"}},
    {"versions": {"torch": "1.0"}},
    {"base": {"weights_sha256": "1" * 64}},
    {"width": 32},
    {"rows_per_chunk": 8},
    {"head": {"softcap": 3.0}},
]


@pytest.mark.parametrize("change", CONTENT, ids=lambda change: next(iter(change)))
def test_the_fingerprint_changes_with_the_content(
    manifest: Manifest, change: dict[str, Any]
) -> None:
    assert replace(manifest, **change).fingerprint != manifest.fingerprint


def test_the_fingerprint_does_not_depend_on_the_location_of_the_base(
    manifest: Manifest,
) -> None:
    moved = replace(manifest, base=manifest.base | {"id": "elsewhere", "revision": "abc"})
    assert moved.fingerprint == manifest.fingerprint
    assert replace(manifest, files={}).fingerprint == manifest.fingerprint
    assert origin_of(moved, 0) == origin_of(manifest, 0)


def test_the_origin_differs_per_unit_and_survives_an_append(manifest: Manifest) -> None:
    assert origin_of(manifest, 0) != origin_of(manifest, 1)
    more = replace(
        manifest.parts[0],
        fingerprint="f" * 64,
        first_unit=manifest.num_units,
        first_sample=manifest.num_samples,
    )
    longer = replace(manifest, parts=[*manifest.parts, more])
    assert origin_of(longer, 1) == origin_of(manifest, 1)
    assert origin_of(longer, manifest.num_units) != origin_of(manifest, 0)
    assert longer.is_stage_of(manifest)
    assert manifest.is_stage_of(longer)
    assert not replace(manifest, width=3).is_stage_of(manifest)
    assert (longer.num_units, longer.num_tokens) == (
        2 * manifest.num_units,
        2 * manifest.num_tokens,
    )


def with_part(manifest: Manifest, **values: Any) -> Manifest:  # noqa: ANN401
    return replace(manifest, parts=[replace(manifest.parts[0], **values)])


REPORT = {"records": 3, "kept": 2, "tokens": 9, "losses": [], "notes": []}


def test_a_report_that_is_empty_leaves_the_document_as_it_was(manifest: Manifest) -> None:
    [part] = manifest.to_dict()["parts"]
    assert set(part) == {
        "fingerprint", "files", "counts", "first_unit", "num_units", "first_sample", "num_samples",
    }  # fmt: skip


def test_a_report_is_kept_but_decides_neither_fingerprint_nor_order(manifest: Manifest) -> None:
    """Its places are paths: the same data in another folder are the same store."""
    told = with_part(manifest, report=REPORT, kinds={"text": 20})
    again = Manifest.from_dict(
        {key: value for key, value in json.loads(json.dumps(told.to_dict())).items()}, name="x"
    )
    assert again == told
    assert told.fingerprint == manifest.fingerprint
    assert told.samples_digest == manifest.samples_digest


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"report": [1]}, "report: expected dict"),
        ({"report": {"first": "x" * (1 << 20)}}, "report: expected at most"),
        ({"kinds": {"text": "many"}}, "counts and kinds: expected whole numbers"),
        ({"counts": {"tokens": 1.5}}, "counts and kinds: expected whole numbers"),
        ({"num_units": "3"}, "num_units: expected int"),
        ({"fingerprint": 3}, "fingerprint: expected str"),
    ],
)
def test_a_part_with_values_of_another_type_is_damaged(
    manifest: Manifest, values: dict[str, Any], problem: str
) -> None:
    document = with_part(manifest, **values).to_dict()
    with pytest.raises(DamagedStoreError, match=problem):
        Manifest.from_dict(document, name="x")
