"""A part of a grown store is as a store of its own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.tiny_stores import extract_tiny

from carryon.cache.base.model import Base
from carryon.cache.errors import InputError, UnfinishedStoreError
from carryon.cache.store.reader import Store
from carryon.cache.store.view import open_store


@pytest.fixture(scope="module")
def grown(
    store_original: Path,
    store_more_data: Path,
    tiny_base: Base,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    root = tmp_path_factory.mktemp("grown") / "store"
    shutil.copytree(store_original, root)
    extract_tiny(tiny_base, store_more_data, root, append=True)
    return root


def test_each_part_reads_as_a_store_of_its_own(
    grown: Path, store_original: Path, store_more_data: Path, tiny_base: Base, tmp_path: Path
) -> None:
    extract_tiny(tiny_base, store_more_data, tmp_path / "alone")

    for number, alone in ((1, store_original), (2, tmp_path / "alone")):
        part, own = open_store(f"{grown}#{number}"), Store.open(alone)
        assert part.fingerprint == own.fingerprint
        assert (part.num_units, part.num_tokens) == (own.num_units, own.num_tokens)
        for name in ("sample_starts", "sample_lengths", "sample_held_out"):
            assert np.array_equal(getattr(part, name), getattr(own, name))
        for found, expected in zip(part.iter_units(), own.iter_units(), strict=True):
            assert (found.unit, found.samples) == (expected.unit, expected.samples)
            assert np.array_equal(found.tokens, expected.tokens)
            for tap, states in expected.hidden.items():
                assert np.array_equal(found.hidden[tap], states)
        last = own.num_samples - 1
        assert part.index_of(own.sample_id(last)) == last
        found_rows, rows = (each.read_sample(own.sample_id(last)) for each in (part, own))
        assert found_rows.sample == rows.sample
        assert np.array_equal(found_rows.hidden["final"], rows.hidden["final"])


def test_a_part_that_is_not_there_is_named(grown: Path) -> None:
    with pytest.raises(InputError, match="expected a part from 1 to 2, got 3"):
        open_store(f"{grown}#3")
    assert open_store(str(grown)).fingerprint == Store.open(grown).fingerprint


def test_a_part_opens_while_another_is_not_finished(grown: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(grown, root)
    whole = Store.open(root)
    (root / "units" / f"{whole.num_units - 1}.json").unlink()

    first = open_store(f"{root}#1")
    assert first.num_units < whole.num_units
    assert first.read_unit(0).samples.start == 0
    with pytest.raises(UnfinishedStoreError, match="1 of . units of part 2 are not extracted"):
        open_store(f"{root}#2")
