"""A part of a grown store reads as a store with only its samples."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.tiny_stores import extract_tiny

from carryon.cache.base.model import Base
from carryon.cache.errors import InputError, UnfinishedStoreError
from carryon.cache.store.reader import Store


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


def test_each_part_reads_as_a_store_with_only_its_samples(
    grown: Path, store_original: Path, store_more_data: Path, tiny_base: Base, tmp_path: Path
) -> None:
    extract_tiny(tiny_base, store_more_data, tmp_path / "alone")

    for number, alone in ((1, store_original), (2, tmp_path / "alone")):
        part, own = Store.open(f"{grown}#{number}"), Store.open(alone)
        assert part.fingerprint == own.fingerprint
        assert (part.num_units, part.num_tokens) == (own.num_units, own.num_tokens)
        for name in ("sample_starts", "sample_lengths", "sample_held_out"):
            assert np.array_equal(getattr(part, name), getattr(own, name))
        for found, expected in zip(part.iter_units(), own.iter_units(), strict=True):
            assert (found.unit, found.samples) == (expected.unit, expected.samples)
            assert np.array_equal(found.tokens, expected.tokens)
            for tap, states in expected.hidden.items():
                assert np.array_equal(found.hidden[tap], states)
        assert [sample.id for sample in part] == [sample.id for sample in own]
        assert [sample.index for sample in part] == list(range(len(own))) == list(range(len(part)))
        for index in range(len(own)):
            assert part[index].index == part.index_of(own.sample_id(index)) == index
            assert part.unit_of(index) == own.unit_of(index)
            assert part[index - len(own)].tokens.tolist() == own[index].tokens.tolist()
        assert [part.unit_samples(unit) for unit in range(part.num_units)] == [
            own.unit_samples(unit) for unit in range(own.num_units)
        ]
        assert repr(part).startswith(f"<Store '{grown}#{number}': {len(own)} samples, ")
        assert np.array_equal(part.head().weight, own.head().weight)
        last = own.num_samples - 1
        assert part.index_of(own.sample_id(last)) == last
        found_rows, rows = (each.read_sample(own.sample_id(last)) for each in (part, own))
        assert found_rows.index == rows.index
        assert np.array_equal(found_rows.hidden["final"], rows.hidden["final"])


def test_a_sample_of_another_part_is_refused(grown: Path) -> None:
    first, second = (Store.open(f"{grown}#{number}") for number in (1, 2))
    for part, other in ((first, second), (second, first)):
        with pytest.raises(InputError, match="no sample with the id"):
            part.read_sample(other.sample_id(0))
        with pytest.raises(
            InputError, match=f"a sample from 0 to {len(part) - 1}, got {len(part)}"
        ):
            part.read_sample(len(part))
        with pytest.raises(InputError, match=f"a unit from 0 to {part.num_units - 1}, got -1"):
            part.read_unit(-1)


def test_a_missing_part_is_named(grown: Path) -> None:
    with pytest.raises(InputError, match="expected a part from 1 to 2, got 3"):
        Store.open(f"{grown}#3")
    assert Store.open(str(grown)).fingerprint == Store.open(grown).fingerprint


def test_a_part_opens_while_another_is_not_finished(grown: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    shutil.copytree(grown, root)
    whole = Store.open(root)
    (root / "units" / f"{whole.num_units - 1}.json").unlink()

    first = Store.open(f"{root}#1")
    assert first.num_units < whole.num_units
    assert first.read_unit(0).samples.start == 0
    with pytest.raises(UnfinishedStoreError, match="store#2: 1 of . units are not extracted"):
        Store.open(f"{root}#2")
