"""Tables of samples: groups and roles, also of stores from before there were any; equal ids."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.tiny_stores import (
    drop_groups,
    extract_tiny,
    make_given,
    plan_given,
    readable_content,
    small_pieces,
    write_corpus,
    write_store,
)

from carryon.cache import verify
from carryon.cache.base.model import Base
from carryon.cache.corpus.samples import Sample, SampleTable
from carryon.cache.errors import InputError
from carryon.cache.extraction import sample_tables
from carryon.cache.extraction.sample_tables import refuse_known_ids
from carryon.cache.store.reader import Store


def named(ids: list[str]) -> SampleTable:
    row = np.ones(3, dtype=np.int32)
    return SampleTable.of(
        Sample(
            id=name,
            tokens=row,
            loss_mask=row.astype(np.uint8),
            char_end=row,
            is_held_out=False,
        )
        for name in ids
    )


def test_groups_and_roles_are_kept_in_stored_order(store_tmp: Path) -> None:
    given = make_given()
    given.samples[:] = [
        replace(sample, group=(1 << 63) + index // 3, role=index % 3)
        for index, sample in enumerate(given.samples)
    ]
    write_store(store_tmp / "store", given)
    store = Store.open(store_tmp / "store")
    order = given.plan.order.tolist()
    assert store.sample_groups.tolist() == [given.samples[index].group for index in order]
    assert store.sample_roles.tolist() == [given.samples[index].role for index in order]


def test_a_store_from_before_has_a_group_a_sample(store_folder: Path) -> None:
    drop_groups(store_folder)
    store = Store.open(store_folder)
    assert store.sample_groups.tolist() == list(range(store.num_samples))
    assert store.sample_roles.tolist() == [0] * store.num_samples
    assert verify(store_folder, depth="full").is_complete


def test_appending_to_a_store_from_before_writes_groups_for_all_its_samples(
    tiny_base: Base, store_folder: Path, store_data: Path, store_more_data: Path
) -> None:
    drop_groups(store_folder)
    before = Store.open(store_folder)
    num_before = before.num_samples
    extract_tiny(tiny_base, store_more_data, store_folder, append=True)
    store = Store.open(store_folder)
    assert store.num_samples == num_before + 8
    assert store.sample_groups[:num_before].tolist() == list(range(num_before))
    assert len(np.unique(store.sample_groups)) == store.num_samples
    assert store.sample_roles.tolist() == [0] * store.num_samples
    assert verify(store_folder, depth="full").is_complete
    assert before.sample_groups.tolist() == list(range(num_before)), "a reader opened before"
    part = Store.open(f"{store_folder}#1")
    assert part.fingerprint == before.fingerprint
    assert part.sample_groups.tolist() == list(range(num_before))


def test_tables_that_grow_are_those_of_a_store_made_at_once_but_for_its_order(
    tiny_base: Base, store_tmp: Path
) -> None:
    """8 rows a chunk: 12 samples, then 8, then 13 cross chunks in every way."""
    root, first = store_tmp / "store", 0
    for num_samples in (12, 8, 13):
        data = write_corpus(store_tmp / f"{first}.jsonl", num_samples=num_samples, first=first)
        extract_tiny(tiny_base, data, root, append=first > 0)
        first += num_samples
    content = readable_content(root)
    assert sorted(content["ids"]) == sorted(f"text-{index}" for index in range(33))
    assert len(set(content["groups"][0])) == 33
    assert verify(root, depth="full").is_complete


def test_an_id_of_the_store_is_refused_wherever_it_lies(store_tmp: Path) -> None:
    with small_pieces():
        manifest = plan_given(store_tmp / "store", make_given())
    for index in (0, 7, 8, 19):
        table = named(["new", f"sample-0-{index}", "newer"])
        with pytest.raises(InputError, match=f"sample 'sample-0-{index}': a sample with this id"):
            refuse_known_ids(store_tmp / "store", manifest, table)
    refuse_known_ids(store_tmp / "store", manifest, named(["sample-0-20", "sample-0-", "s"]))


def test_equal_hashes_of_different_ids_are_told_apart(
    store_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_pieces():
        manifest = plan_given(store_tmp / "store", make_given())
    monkeypatch.setattr(sample_tables, "_hash_rows", lambda rows: np.zeros(len(rows), np.uint64))
    refuse_known_ids(store_tmp / "store", manifest, named(["new", "newer"]))
    with pytest.raises(InputError, match="sample 'sample-0-19'"):
        refuse_known_ids(store_tmp / "store", manifest, named(["new", "sample-0-19"]))


def test_hashes_of_ids_that_differ_in_one_byte_differ() -> None:
    width = 128
    rows = np.zeros((width * 255, width), dtype=np.uint8)
    rows[np.arange(len(rows)), np.arange(len(rows)) % width] = 1 + np.arange(len(rows)) // width
    assert len(np.unique(sample_tables._hash_rows(rows))) == len(rows)
    pairs = rows[: width * 20] | np.roll(rows[: width * 20], 8, axis=1)
    assert len(np.unique(sample_tables._hash_rows(pairs))) == len(np.unique(pairs, axis=0))


def test_an_id_that_needs_more_room_than_the_store_keeps_is_refused(store_tmp: Path) -> None:
    manifest = plan_given(store_tmp / "store", make_given())
    with pytest.raises(InputError, match="keeps 64 bytes for an id, got one that needs 80"):
        refuse_known_ids(store_tmp / "store", manifest, named(["x" * 65]))
    refuse_known_ids(store_tmp / "store", manifest, named(["x" * 64]))


def test_long_ids_make_the_rows_of_a_new_store_longer(store_tmp: Path) -> None:
    given = make_given()
    given.samples[3] = replace(given.samples[3], id="\u00e4" * 100)
    write_store(store_tmp / "store", given)
    store = Store.open(store_tmp / "store")
    index = store.index_of("\u00e4" * 100)
    assert store[index].tokens.tolist() == given.samples[3].tokens.tolist()
