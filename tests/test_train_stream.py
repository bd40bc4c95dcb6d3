"""carryon.train.stream and batch: the right rows, in the given order, within the memory bound."""

import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_train_stores import make_tiny_store

from carryon.cache.errors import DamagedStoreError
from carryon.cache.layout import shard_path
from carryon.cache.reader import Store, Unit
from carryon.train.batch import Batch, make_batch
from carryon.train.config import StreamSettings
from carryon.train.evaluate import sample_units
from carryon.train.order import Window, plan_epoch, seek
from carryon.train.stream import Stream, stream_bytes

SETTINGS = StreamSettings(window_units=2, read_ahead_units=1)


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
        batch_tokens=36,
        micro_batch_tokens=micro_batch_tokens,
        window_units=2,
    )


def _read(store: Store, windows: list[Window], settings: StreamSettings) -> list[list[Batch]]:
    stream = Stream(store, windows, taps=["final"], settings=settings, is_pinned=False)
    with stream as steps:
        return list(steps)


def test_a_batch_holds_the_states_and_tokens_of_its_samples(store: Store) -> None:
    unit = store.read_unit(0)
    samples = np.array(unit.samples)[::-1].copy()

    batch = make_batch(samples, {0: unit}, taps=["final", "layer.1"], is_pinned=False)

    first = 0
    for row, sample in enumerate(samples.tolist()):
        expected = store.read_sample(sample)
        here = slice(first, first + len(expected.tokens))
        assert batch.lengths[row] == len(expected.tokens)
        assert batch.tokens[here].tolist() == expected.tokens.tolist()
        for tap in ("final", "layer.1"):
            bits = batch.states[tap][here].view(torch.int16).numpy().view(np.uint16)
            np.testing.assert_array_equal(bits, expected.hidden[tap])
        first = here.stop
    assert len(batch.tokens) == batch.num_tokens == first


def test_a_supervised_pair_is_a_state_and_the_next_token_of_the_same_sample(store: Store) -> None:
    unit = store.read_unit(0)
    samples = np.array(unit.samples)

    batch = make_batch(samples, {0: unit}, taps=["final"], is_pinned=False)

    found = []
    for pair, (position, target) in enumerate(
        zip(batch.positions.tolist(), batch.targets.tolist(), strict=True)
    ):
        starts = np.cumsum(batch.lengths) - batch.lengths
        row = int(np.searchsorted(starts, position, side="right")) - 1
        column = position - int(starts[row])
        assert batch.sample_of(pair) == samples[row]
        found.append((int(samples[row]), column, target))
    expected = [
        (sample, token - 1, int(rows.tokens[token]))
        for sample in samples.tolist()
        for rows in [store.read_sample(sample)]
        for token in range(1, len(rows.tokens))
        if rows.loss_mask[token] == 1
    ]
    assert found == expected


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

    resumed = _read(store, seek(windows, 3), SETTINGS)

    assert len(resumed) == len(whole) - 3
    for (found,), (expected,) in zip(resumed, whole[3:], strict=True):
        assert torch.equal(found.states["final"], expected.states["final"])
        assert torch.equal(found.targets, expected.targets)


def test_more_threads_give_the_same_batches(store: Store) -> None:
    windows = _windows(store)
    settings = StreamSettings(window_units=2, read_ahead_units=2, reader_threads=3)

    one, three = _read(store, windows, SETTINGS), _read(store, windows, settings)

    for (found,), (expected,) in zip(three, one, strict=True):
        assert torch.equal(found.states["final"], expected.states["final"])


class _CountingStore:
    """A store that notes which units are read, and how many of them are alive at one time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._alive: list[weakref.ref[NDArray[np.uint16]]] = []
        self.reads: list[int] = []
        self.most_alive = 0

    def read_unit(self, unit: int, *, taps: list[str]) -> Unit:
        self.reads.append(unit)
        read = self._store.read_unit(unit, taps=taps)
        self._alive.append(weakref.ref(read.hidden["final"]))
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self._alive))
        return read


def test_each_unit_is_read_once_and_few_are_in_memory(tmp_path: Path) -> None:
    counting = _CountingStore(Store.open(make_tiny_store(tmp_path / "store", num_samples=80)))
    windows = _windows(counting._store)
    assert len(windows) >= 4

    stream = Stream(counting, windows, taps=["final"], settings=SETTINGS, is_pinned=False)  # type: ignore[arg-type]
    with stream as steps:
        for _ in steps:
            pass

    assert sorted(counting.reads) == list(range(counting._store.num_units))
    assert counting.most_alive <= SETTINGS.window_units + SETTINGS.read_ahead_units


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


@pytest.mark.parametrize("taps", [["final"], ["final", "layer.1"]])
def test_the_memory_bound_counts_window_read_ahead_and_ready_steps(
    store: Store, taps: list[str]
) -> None:
    rows = 3 * 64 + 6 * 36  # units of 64 rows, steps of 36

    bound = stream_bytes(store, taps=taps, settings=SETTINGS, batch_tokens=36)

    assert store.num_units >= 4
    assert bound == rows * 16 * 2 * len(taps)  # width, bytes of bfloat16


def test_waiting_for_data_is_measured(store: Store) -> None:
    stream = Stream(store, _windows(store), taps=["final"], settings=SETTINGS, is_pinned=False)
    with stream as steps:
        list(steps)

    assert stream.wait_s > 0
