"""Samples into units, and the arithmetic of names and chunks: pure functions."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from carryon.cache.errors import InputError
from carryon.cache.extraction.packing import UnitPlan, plan_batches, plan_units
from carryon.cache.format import zarr_metadata


@dataclass(frozen=True, kw_only=True)
class Sizes:
    id: str
    lengths: list[int]
    unit_tokens: int
    held_out_every: int = 0

    @property
    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        index = np.arange(len(self.lengths))
        every = self.held_out_every or len(self.lengths) + 1
        return np.array(self.lengths, dtype=np.int32), index % every == every - 1

    def plan(self, *, seed: int = 0) -> UnitPlan:
        lengths, held_out = self.arrays
        return plan_units(lengths, held_out, unit_tokens=self.unit_tokens, seed=seed)


random = np.random.default_rng(0)
SIZES = [
    Sizes(id="one", lengths=[5], unit_tokens=16),
    Sizes(id="one as large as the unit", lengths=[16], unit_tokens=16),
    Sizes(id="all as large as the unit", lengths=[16] * 5, unit_tokens=16, held_out_every=2),
    Sizes(id="of one token", lengths=[1] * 50, unit_tokens=16, held_out_every=7),
    Sizes(id="all held out", lengths=[4, 5, 6], unit_tokens=16, held_out_every=1),
    Sizes(id="fills exactly, then held out", lengths=[8, 8, 8, 8], unit_tokens=16,
          held_out_every=4),
    Sizes(id="many", lengths=random.integers(1, 65, 500).tolist(), unit_tokens=64,
          held_out_every=5),
    Sizes(id="long tail", lengths=np.minimum(random.lognormal(3, 1, 500) + 1, 256)
          .astype(int).tolist(), unit_tokens=256, held_out_every=20),
]  # fmt: skip


def laid_out_one_by_one(case: Sizes, order: list[int]) -> list[int]:
    """Return the start of each sample by the rule itself, a step a sample."""
    lengths, held_out = case.arrays
    starts, unit, used = [], 0, 0
    num_train = int((~held_out).sum())
    for position, index in enumerate(order):
        opens_held_out = position == num_train and used > 0
        if used + lengths[index] > case.unit_tokens or opens_held_out:
            unit, used = unit + 1, 0
        starts.append(unit * case.unit_tokens + used)
        used += int(lengths[index])
    return starts


@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.id)
def test_samples_lie_where_laying_them_out_one_by_one_puts_them(case: Sizes) -> None:
    plan = case.plan(seed=3)
    assert plan.start.tolist() == laid_out_one_by_one(case, plan.order.tolist())


def test_no_samples_make_no_unit() -> None:
    assert Sizes(id="none", lengths=[], unit_tokens=16).plan().num_units == 0


@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.id)
def test_samples_have_disjoint_rows_within_one_unit(case: Sizes) -> None:
    lengths, held_out = case.arrays
    plan = case.plan()
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    stops = plan.start + lengths[plan.order]
    assert (plan.start[1:] >= stops[:-1]).all()  # rows disjoint, in the order of the token axis
    assert (plan.start // case.unit_tokens == plan.unit).all()
    assert ((stops - 1) // case.unit_tokens == plan.unit).all()
    assert plan.start[0] == 0
    assert plan.num_units == plan.unit.max() + 1
    assert set(plan.unit.tolist()) == set(range(plan.num_units))  # no unit is empty


@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.id)
def test_held_out_samples_are_last_in_separate_units(case: Sizes) -> None:
    _, held_out = case.arrays
    plan = case.plan()
    flags = held_out[plan.order]
    assert (np.diff(flags.astype(int)) >= 0).all()
    assert not set(plan.unit[flags].tolist()) & set(plan.unit[~flags].tolist())


@pytest.mark.parametrize("case", SIZES, ids=lambda case: case.id)
def test_samples_of_a_unit_have_no_gap_between_them(case: Sizes) -> None:
    lengths, _ = case.arrays
    plan = case.plan()
    for unit in range(plan.num_units):
        inside = plan.unit == unit
        within = plan.start[inside] - unit * case.unit_tokens
        expected = np.concatenate([[0], np.cumsum(lengths[plan.order[inside]])[:-1]])
        assert within.tolist() == expected.tolist()


def test_a_new_unit_begins_only_with_a_sample_that_does_not_fit() -> None:
    case = SIZES[-2]
    lengths, held_out = case.arrays
    plan = case.plan()
    flags = held_out[plan.order]
    for position in np.flatnonzero(np.diff(plan.unit)) + 1:
        if flags[position] == flags[position - 1]:
            used = lengths[plan.order[plan.unit == plan.unit[position - 1]]].sum()
            assert used + lengths[plan.order[position]] > case.unit_tokens


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    case = SIZES[-2]
    one, again, other = case.plan(), case.plan(), case.plan(seed=1)
    assert one.order.tolist() == again.order.tolist()
    assert one.start.tolist() == again.start.tolist()
    assert one.order.tolist() != other.order.tolist()


def test_planning_shuffles_and_does_not_change_its_arguments() -> None:
    case = SIZES[-2]
    lengths, held_out = case.arrays
    before = lengths.copy(), held_out.copy()
    plan = plan_units(lengths, held_out, unit_tokens=64, seed=0)
    np.testing.assert_array_equal((lengths, held_out), before)
    # A random order has about one fixed point; a sorted one has all.
    assert np.count_nonzero(plan.order == np.arange(len(lengths))) < 10


def test_a_sample_longer_than_a_unit_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match="a sample of 17 tokens does not fit in a unit of 16"):
        plan_units(np.array([3, 17], np.int32), np.zeros(2, np.bool_), unit_tokens=16, seed=0)


def test_no_samples_make_no_units() -> None:
    plan = plan_units(np.zeros(0, np.int32), np.zeros(0, np.bool_), unit_tokens=16, seed=0)
    assert (plan.num_units, len(plan.order)) == (0, 0)


@pytest.mark.parametrize("batch_tokens", [1, 64, 200, 4096])
def test_batches_hold_every_sample_once_longest_first_within_the_limit(batch_tokens: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 129, 100).astype(np.int32)
    batches = plan_batches(lengths, batch_tokens=batch_tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(100))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= batch_tokens
    longest = [int(lengths[batch[0]]) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    again = plan_batches(lengths, batch_tokens=batch_tokens)
    assert [batch.tolist() for batch in again] == [batch.tolist() for batch in batches]


# Layout


@pytest.mark.parametrize("unit_tokens", [16, 64, 8192, 32768, 40000])
@pytest.mark.parametrize("row_bytes", [32, 1152, 5120, 10240])
def test_chunks_divide_the_unit_and_stay_below_the_limit(unit_tokens: int, row_bytes: int) -> None:
    rows = zarr_metadata.chunk_rows(row_bytes=row_bytes, unit_tokens=unit_tokens)
    assert unit_tokens % rows == 0
    assert rows == 1 or rows * row_bytes <= zarr_metadata.CHUNK_BYTES
    larger = [more for more in range(rows + 1, unit_tokens + 1) if unit_tokens % more == 0]
    assert not larger or larger[0] * row_bytes > zarr_metadata.CHUNK_BYTES


def test_a_unit_that_only_tiny_chunks_divide_is_refused() -> None:
    with pytest.raises(InputError, match="got 32771, whose chunks would have 1 row"):
        zarr_metadata.chunk_rows(row_bytes=1152, unit_tokens=32771)  # a prime


def test_files_of_units_have_distinct_names() -> None:
    names = [
        name
        for unit in range(12)
        for name in (
            *zarr_metadata.state_paths(["final", "layer.1", "layer.11"], unit, is_lossy=True),
            *(zarr_metadata.row_path(name, unit) for name in zarr_metadata.ROW_ARRAYS),
            zarr_metadata.receipt_path(unit),
        )
    ]
    assert len(set(names)) == len(names) == 12 * (9 + 3 + 1)
    assert not [name for name in names if zarr_metadata.copy_path(name) in names]


def test_documents_are_plain_json_with_every_chunk_one_block() -> None:
    document = zarr_metadata.array_document(
        shape=(256, 16), chunk=(16, 16), shard=(64, 16), dtype="uint16", attributes={"a": 1}
    )
    assert json.loads(json.dumps(document)) == document
    assert document["chunk_grid"]["configuration"]["chunk_shape"] == [64, 16]
    (sharding,) = document["codecs"]
    inner = sharding["configuration"]
    assert inner["chunk_shape"] == [16, 16]
    assert [codec["name"] for codec in inner["codecs"]] == ["bytes", "blosc", "crc32c"]
    assert inner["codecs"][1]["configuration"]["blocksize"] == 16 * 16 * 2


def test_all_but_the_heads_arrays_is_written_twice() -> None:
    paths = ["head/zarr.json", "head/lm_head/zarr.json", "head/norm_weight/c/0", "samples/id/c/0"]
    assert [zarr_metadata.is_mirrored(path) for path in paths] == [True, False, False, True]
