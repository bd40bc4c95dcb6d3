"""The right rows, in the given order, within the memory bound."""

import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_train_stores import make_tiny_store

from carryon.cache.errors import DamagedStoreError
from carryon.cache.format.zarr_metadata import shard_path
from carryon.cache.store import buffers
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_reader import CopyRange
from carryon.train.config import StreamSettings
from carryon.train.data.batch import Batch
from carryon.train.data.loader import Stream, stream_bytes
from carryon.train.data.sampler import Window, plan_epoch, take_steps
from carryon.train.data.split import sample_units

SETTINGS = StreamSettings(window_units=2, reader_threads=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("stream") / "store"
    return Store.open(make_tiny_store(path, taps=("final", "layer.1")))


def _windows(store: Store, *, micro_batch_tokens: int = 0) -> list[Window]:
    return plan_epoch(
        np.arange(store.num_samples),
        lengths=store.sample_lengths,
        units=sample_units(store),
        seed=(0,),
        epoch=0,
        tokens_per_step=36,
        micro_batch_tokens=micro_batch_tokens,
        window_units=2,
    )


def _read(store: Store, windows: list[Window], settings: StreamSettings) -> list[list[Batch]]:
    stream = Stream(store, windows, taps=["final"], settings=settings, is_pinned=False)
    with stream as steps:
        return list(steps)


def test_a_batch_holds_the_states_and_tokens_of_its_samples(store: Store) -> None:
    windows = _windows(store, micro_batch_tokens=18)
    taps = ["final", "layer.1"]

    with Stream(store, windows, taps=taps, settings=SETTINGS, is_pinned=False) as stream:
        batches = [batch for step in stream for batch in step]

    for batch in batches:
        first = 0
        for row, sample in enumerate(batch.samples.tolist()):
            expected = store.read_sample(sample)
            here = slice(first, first + len(expected.tokens))
            assert batch.lengths[row] == len(expected.tokens)
            assert batch.tokens[here].tolist() == expected.tokens.tolist()
            for tap in taps:
                bits = batch.states[tap][here].view(torch.int16).numpy().view(np.uint16)
                np.testing.assert_array_equal(bits, expected.hidden[tap])
            first = here.stop
        assert len(batch.tokens) == batch.num_tokens == first
    assert sum(len(batch.samples) for batch in batches) == store.num_samples


def test_a_supervised_pair_is_a_state_and_the_next_token_of_the_same_sample(store: Store) -> None:
    [[batch]] = _read(store, _windows(store), SETTINGS)[:1]

    actual = []
    for pair, (position, target) in enumerate(
        zip(batch.positions.tolist(), batch.targets.tolist(), strict=True)
    ):
        starts = np.cumsum(batch.lengths) - batch.lengths
        row = int(np.searchsorted(starts, position, side="right")) - 1
        column = position - int(starts[row])
        assert int(batch.rows_of_pairs()[pair]) == row
        actual.append((int(batch.samples[row]), column, target))
    expected = [
        (sample, token - 1, int(rows.tokens[token]))
        for sample in batch.samples.tolist()
        for rows in [store.read_sample(sample)]
        for token in range(1, len(rows.tokens))
        if rows.loss_mask[token] == 1
    ]
    assert actual == expected


@pytest.mark.parametrize("profile", ["raw", "near", "compact"])
def test_a_store_of_another_profile_streams_what_it_reads(tmp_path: Path, profile: str) -> None:
    store = Store.open(make_tiny_store(tmp_path / "store", num_samples=60, profile=profile))

    batches = [batch for step in _read(store, _windows(store), SETTINGS) for batch in step]

    for batch in batches:
        expected = np.concatenate(
            [store.read_sample(sample).hidden["final"] for sample in batch.samples.tolist()]
        )
        bits = batch.states["final"].view(torch.int16).numpy().view(np.uint16)
        np.testing.assert_array_equal(bits, expected)


def test_the_stream_gives_the_planned_steps_in_order(store: Store) -> None:
    windows = _windows(store, micro_batch_tokens=18)

    steps = _read(store, windows, SETTINGS)

    planned = [step for window in windows for step in window.steps]
    assert [[batch.samples.tolist() for batch in step] for step in steps] == [
        [samples.tolist() for samples in step] for step in planned
    ]


def test_a_stream_from_a_position_gives_the_same_next_batches(store: Store) -> None:
    windows = _windows(store)
    whole = _read(store, windows, SETTINGS)

    resumed = _read(store, take_steps(windows, first=3), SETTINGS)

    assert len(resumed) == len(whole) - 3
    for (actual,), (expected,) in zip(resumed, whole[3:], strict=True):
        assert torch.equal(actual.states["final"], expected.states["final"])
        assert torch.equal(actual.targets, expected.targets)


def test_more_threads_give_the_same_batches(store: Store) -> None:
    windows = _windows(store)
    settings = StreamSettings(window_units=2, reader_threads=3)

    one, three = _read(store, windows, SETTINGS), _read(store, windows, settings)

    for (actual,), (expected,) in zip(three, one, strict=True):
        assert torch.equal(actual.states["final"], expected.states["final"])


class _CountingStore(Store):
    """A store that notes which units are read."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.root, store.manifest, store.finished_units)
        self.reads: list[int] = []

    def copy_states(self, unit: int, tap: str, moves: Sequence[CopyRange]) -> None:
        self.reads.append(unit)
        super().copy_states(unit, tap, moves)


def test_each_unit_is_read_once(tmp_path: Path) -> None:
    counting = _CountingStore(Store.open(make_tiny_store(tmp_path / "store", num_samples=80)))
    windows = _windows(counting)
    assert len(windows) >= 4

    _read(counting, windows, SETTINGS)

    assert sorted(counting.reads) == list(range(counting.num_units))


@pytest.mark.parametrize("taps", [["final"], ["final", "layer.1"]])
def test_memory_stays_within_the_bound_and_is_used_again(tmp_path: Path, taps: list[str]) -> None:
    path = make_tiny_store(tmp_path / "store", num_samples=200, taps=("final", "layer.1"))
    store = Store.open(path)
    windows = _windows(store)
    assert len(windows) >= 8

    with Stream(store, windows, taps=taps, settings=SETTINGS, is_pinned=False) as stream:
        for step in stream:
            assert len(step) == 1
        made_bytes = stream.made_bytes

    num_rows = int(store.sample_lengths.sum())
    bound = stream_bytes(store, windows, taps=taps)
    assert made_bytes <= bound < num_rows * 16 * 2 * len(taps)  # width, bytes of bfloat16


def test_memory_stays_within_the_bound_where_windows_are_planned_as_they_are_read(
    tmp_path: Path,
) -> None:
    store = Store.open(make_tiny_store(tmp_path / "store", num_samples=200))
    windows = _windows(store)
    sizes = [max(int(store.sample_lengths[each].sum()) for [each] in w.steps) for w in windows]
    assert max(sizes) > max(sizes[:2]), "a later window has a larger batch"
    blocks = tracemalloc.Filter(True, buffers.__file__)
    held = 0

    tracemalloc.start()
    stream = Stream(store, iter(windows), taps=["final"], settings=SETTINGS, is_pinned=False)
    with stream as steps:
        for _ in steps:
            traces = tracemalloc.take_snapshot().filter_traces([blocks]).traces
            held = max(held, sum(trace.size for trace in traces if trace.size > 512))
    tracemalloc.stop()

    assert 0 < held <= stream_bytes(store, windows, taps=["final"])


def test_a_step_that_is_kept_is_not_written_over(store: Store) -> None:
    windows = _windows(store) + _windows(store)

    kept = _read(store, windows, SETTINGS)

    half = len(kept) // 2
    for (first,), (second,) in zip(kept[:half], kept[half:], strict=True):
        assert torch.equal(first.states["final"], second.states["final"])
        assert first.states["final"].data_ptr() != second.states["final"].data_ptr()


def test_closing_a_stream_early_ends_its_threads(store: Store) -> None:
    before = threading.active_count()

    with Stream(store, _windows(store), taps=["final"], settings=SETTINGS, is_pinned=False) as s:
        next(iter(s))

    assert threading.active_count() == before


def test_a_damaged_unit_is_reported_to_the_reader_of_the_stream(tmp_path: Path) -> None:
    root = make_tiny_store(tmp_path / "store", num_samples=60)
    store = Store.open(root)
    path = root / shard_path("final", store.num_units - 1)
    content = bytearray(path.read_bytes())
    content[10] ^= 0xFF
    path.write_bytes(content)

    with pytest.raises(DamagedStoreError):
        _read(store, _windows(store), SETTINGS)


def test_waiting_for_data_is_measured(store: Store) -> None:
    stream = Stream(store, _windows(store), taps=["final"], settings=SETTINGS, is_pinned=False)
    with stream as steps:
        list(steps)

    assert stream.wait_s > 0
