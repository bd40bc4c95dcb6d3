"""The stages around the forward passes: batches, staged states, reading ahead, writers, limits."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.tiny_stores import SETTINGS, UNIT_TOKENS, Given, make_given, plan_given, small_pieces

from carryon.cache.errors import InputError
from carryon.cache.extraction.packing import make_batch, plan_batches
from carryon.cache.extraction.stages import unit_writers
from carryon.cache.extraction.stages.backpressure import limiting_stage, stage_seconds
from carryon.cache.extraction.stages.read_ahead import ReadAhead
from carryon.cache.extraction.stages.staging import Staging
from carryon.cache.extraction.stages.unit_writers import UnitWriters
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.quantization import bfloat16_bits
from carryon.cache.format.receipt import Receipt, units_with_receipt
from carryon.cache.settings import StoreSettings
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_writer import EncodedUnit, UnitInputs, write_unit

LENGTHS = np.array([5, 3, 7, 2, 6, 4], dtype=np.int32)
STARTS = np.cumsum(LENGTHS, dtype=np.int64) - LENGTHS
ROWS, WIDTH = 32, 16
PATIENCE_S = 300.0


def test_a_batch_has_every_token_at_its_place() -> None:
    tokens = np.arange(100, 100 + ROWS, dtype=np.int32)
    for samples in plan_batches(LENGTHS, batch_tokens=16):
        batch = make_batch(samples, lengths=LENGTHS, starts=STARTS, tokens=tokens)
        expected = np.zeros((len(samples), LENGTHS[samples].max()), dtype=np.int64)
        rows = []
        for row, sample in enumerate(samples):
            own = np.arange(STARTS[sample], STARTS[sample] + LENGTHS[sample])
            expected[row, : len(own)] = tokens[own]
            rows.append(own)
        assert np.array_equal(batch.ids, expected)
        assert np.array_equal(batch.rows, np.concatenate(rows))
        assert np.array_equal(batch.ids.reshape(-1)[batch.places], tokens[batch.rows])


def _scattered(values: dict[int, torch.Tensor]) -> NDArray[np.float32]:
    """Return the states [ROWS, WIDTH] of samples, scattered one by one."""
    hidden = np.zeros((ROWS, WIDTH), np.float32)
    for sample, states in values.items():
        hidden[STARTS[sample] : STARTS[sample] + LENGTHS[sample]] = states.float().numpy()
    return hidden


@pytest.mark.parametrize("keeps_bits", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_staged_states_are_those_scattered_one_by_one(keeps_bits: bool, dtype: torch.dtype) -> None:
    """And memory that is used again keeps nothing of the unit before."""
    staging = Staging(["a", "b"], num_rows=ROWS, width=WIDTH, keeps_bits=keeps_bits, streams=None)
    tokens = np.zeros(ROWS, dtype=np.int32)
    num_tokens = int(LENGTHS.sum())
    for unit in range(2):
        torch.manual_seed(unit)
        staging.clear()
        expected: dict[str, dict[int, torch.Tensor]] = {"a": {}, "b": {}}
        for samples in plan_batches(LENGTHS, batch_tokens=16):
            batch = make_batch(samples, lengths=LENGTHS, starts=STARTS, tokens=tokens)
            found = {tap: torch.randn(*batch.ids.shape, WIDTH, dtype=dtype) for tap in ("a", "b")}
            assert staging.add(batch, found) is None
            for tap, states in found.items():
                for row, sample in enumerate(samples.tolist()):
                    kept = states[row, : LENGTHS[sample]]
                    expected[tap][sample] = kept.bfloat16() if keeps_bits else kept
            newest = staging.newest(len(batch.rows))["a"]
            assert newest.shape == (len(batch.rows), WIDTH)
        for tap, rows in staging.rows(num_tokens).items():
            given = rows[:]
            if keeps_bits:
                given = (given.astype(np.uint32) << 16).view(np.float32)
            assert np.array_equal(given, _scattered(expected[tap]))
            for first in range(0, ROWS, 8):
                assert np.array_equal(rows[first : first + 8], rows[:][first : first + 8])


def test_a_token_without_states_or_with_those_of_another_is_refused() -> None:
    staging = Staging(["a"], num_rows=ROWS, width=WIDTH, keeps_bits=True, streams=None)
    tokens, num_tokens = np.zeros(ROWS, dtype=np.int32), int(LENGTHS.sum())
    for _ in range(2):  # places of the unit before count for nothing
        staging.clear()
        for samples in plan_batches(LENGTHS, batch_tokens=16):
            with pytest.raises(RuntimeError, match="expected states of 27 tokens"):
                staging.rows(num_tokens)
            batch = make_batch(samples, lengths=LENGTHS, starts=STARTS, tokens=tokens)
            found = {"a": torch.zeros(*batch.ids.shape, WIDTH)}
            with pytest.raises(InputError, match="tap a: expected a state for each token of"):
                staging.add(batch, {"a": found["a"][:, 1:]})
            staging.add(batch, found)
        staging.rows(num_tokens)
    staging.add(batch, found)
    with pytest.raises(RuntimeError, match="expected states of 27 tokens"):
        staging.rows(num_tokens)
    staging.clear()
    staging.add(batch, found)  # not the first rows of the unit
    with pytest.raises(RuntimeError, match=f"expected states of {len(batch.rows)} tokens"):
        staging.rows(len(batch.rows))


def _count_to(number: int, *, made: list[int] | None = None) -> Any:  # noqa: ANN401
    def numbers(reader: ReadAhead[int]) -> Iterator[int]:
        for each in range(number):
            if made is not None:
                made.append(each)
            yield each

    return numbers


def _nothing() -> None:
    """Find no error."""


def test_an_error_elsewhere_ends_the_wait_for_an_item() -> None:
    def silent(reader: ReadAhead[int]) -> Iterator[int]:
        reader.is_over.wait()
        yield from ()

    def check() -> None:
        raise InputError("a unit cannot be written")

    with ReadAhead(silent, most=1) as reader, pytest.raises(InputError, match="cannot be written"):
        next(reader.items(check))


def test_items_come_in_order_and_an_error_where_its_item_would() -> None:
    def broken(reader: ReadAhead[int]) -> Iterator[int]:
        yield from range(3)
        raise InputError("the fourth")

    with ReadAhead(_count_to(20), most=2) as reader:
        assert list(reader.items(_nothing)) == list(range(20))
    with ReadAhead(broken, most=5) as reader:
        items = reader.items(_nothing)
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(InputError, match="the fourth"):
            next(items)


def test_no_more_is_read_ahead_than_allowed_and_leaving_ends_it() -> None:
    made: list[int] = []
    with ReadAhead(_count_to(1000, made=made), most=3) as reader:
        items = reader.items(_nothing)
        next(items)
        time.sleep(0.05)
        assert len(made) <= 1 + 3 + 1  # taken, waiting, in hand
    assert not any(each.name == "carryon-reader" for each in threading.enumerate())


def test_who_is_slower_is_the_limit() -> None:
    waited = {"read": 0.0, "encode": 3.0, "write": 1.0}
    assert limiting_stage(waited, 10.0) == "encode"
    assert limiting_stage(waited, 100.0) == "forward"
    assert limiting_stage(waited, 0.0) == ""
    assert stage_seconds(waited, 10.0) == {"forward": 6.0} | waited


class _Store:
    """A planned store, whose units are written by a function that may be slow or fail."""

    def __init__(self, root: Path, **settings: object) -> None:
        changed = StoreSettings.from_dict(SETTINGS.to_dict() | settings)
        self.given: Given = make_given(settings=changed, num_samples=60)
        with small_pieces():
            self.manifest: Manifest = plan_given(root, self.given)
        self.root, self.inputs = root, UnitInputs(root, self.manifest)
        self.num_made = self.num_staged = self.most_lost = 0
        self.writers: UnitWriters | None = None

    def staging(self) -> Staging:
        self.num_made += 1
        return Staging(
            self.manifest.taps,
            num_rows=UNIT_TOKENS,
            width=self.manifest.width,
            keeps_bits=True,
            streams=None,
        )

    def fill(self, staging: Staging, unit: int) -> None:
        """Stage the states of a unit in a few batches."""
        read = self.inputs.read(unit)
        for samples in plan_batches(read.lengths, batch_tokens=16):
            how = {"lengths": read.lengths, "starts": read.starts, "tokens": read.tokens}
            batch = make_batch(samples, **how)
            found = {}
            for tap in self.manifest.taps:
                states = np.zeros((batch.ids.size, self.manifest.width), np.float32)
                own = self.given.hidden[tap][unit * UNIT_TOKENS :][batch.rows]
                states[batch.places] = own
                found[tap] = torch.from_numpy(states).reshape(*batch.ids.shape, -1)
            staging.add(batch, found)

    def run(self, write: Any, *, num_encoders: int = 2) -> UnitWriters:  # noqa: ANN401
        """Stage and write all units."""
        with UnitWriters(
            self.root, self.manifest, write, self.staging, num_encoders=num_encoders
        ) as writers:
            self.writers = writers
            for unit in range(self.manifest.num_units):
                staging = writers.take()
                self.most_lost = max(self.most_lost, unit + 1 - len(units_with_receipt(self.root)))
                self.fill(staging, unit)
                self.num_staged += 1
                writers.expect(unit, 1)
                writers.submit(self.inputs.read(unit), staging, elapsed_s=0.0)
            writers.collect(waits=True)
        assert writers.expected_bytes() == 0
        return writers


def wait_until(holds: Callable[[], bool]) -> None:
    """Be as slow as it takes."""
    stop = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < stop
        time.sleep(0.001)


@pytest.mark.parametrize("num_encoders", [1, 3])
def test_a_slow_disk_is_waited_for_and_memory_stays_bounded(
    store_tmp: Path, num_encoders: int
) -> None:
    store = _Store(store_tmp / "store")
    at_work, most = 0, 0
    lock = threading.Lock()

    def slow(*given: Any, **how: Any) -> Receipt:  # noqa: ANN401
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        writers = store.writers
        assert writers is not None
        wait_until(lambda: bool(writers.receipts) or writers.expected_bytes() == 5)
        waited_s = writers.waited_s["write"]
        wait_until(lambda: bool(writers.receipts) or writers.waited_s["write"] > waited_s)
        with lock:
            at_work -= 1
        return write_unit(store.root, store.manifest, *given, **how)

    writers = store.run(slow, num_encoders=num_encoders)

    assert {receipt.unit for receipt in writers.receipts} == set(range(store.manifest.num_units))
    assert store.num_made == 2
    assert most == 3
    assert store.most_lost == 5


def test_what_a_writer_raises_is_raised_by_the_next_call(store_tmp: Path) -> None:
    store = _Store(store_tmp / "store")

    def broken(*given: Any, **how: Any) -> Receipt:  # noqa: ANN401
        raise InputError("no room")

    with pytest.raises(InputError, match="no room"):
        store.run(broken)


def test_memory_is_not_used_again_before_it_is_written(store_tmp: Path) -> None:
    """A raw chunk is written from the memory it was gathered into, while others are gathered."""
    store = _Store(store_tmp / "store", profile="raw")

    def slow(*given: Any, **how: Any) -> Receipt:  # noqa: ANN401
        time.sleep(0.02)
        return write_unit(store.root, store.manifest, *given, **how)

    store.run(slow)

    assert_stored(store)


def test_memory_is_not_used_again_before_it_is_encoded(
    store_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each unit is encoded only when later ones are staged in its memory, or wait for it."""
    store = _Store(store_tmp / "store")
    encode, last = unit_writers.encode_unit, store.manifest.num_units - 1

    def late(*given: Any, **how: Any) -> EncodedUnit:  # noqa: ANN401
        writers, unit = store.writers, given[2].unit
        assert writers is not None
        waited_s = writers.waited_s["encode"]
        wait_until(
            lambda: store.num_staged > min(last, unit + 3) or writers.waited_s["encode"] > waited_s
        )
        return encode(*given, **how)

    monkeypatch.setattr(unit_writers, "encode_unit", late)
    store.run(partial(write_unit, store.root, store.manifest))

    assert store.num_staged == last + 1 > 4
    assert_stored(store)


def assert_stored(store: _Store) -> None:
    """Check that a store holds the states that were staged."""
    for unit in Store.open(store.root).iter_units():
        rows = slice(unit.unit * UNIT_TOKENS, (unit.unit + 1) * UNIT_TOKENS)
        for tap, stored in unit.hidden.items():
            assert np.array_equal(stored, bfloat16_bits(store.given.hidden[tap][rows]))


def test_ctrl_c_keeps_what_is_computed_and_hides_no_error(
    store_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = _Store(store_tmp / "store")

    def half(*given: Any, **how: Any) -> Receipt:  # noqa: ANN401
        if given[0].unit == 0:
            raise InputError("no room for unit 0")
        return write_unit(store.root, store.manifest, *given, **how)

    def interrupted() -> None:
        how = (store.root, store.manifest, half, store.staging)
        with UnitWriters(*how, num_encoders=1) as writers:
            for unit in range(2):
                staging = store.staging()
                store.fill(staging, unit)
                writers.submit(store.inputs.read(unit), staging, elapsed_s=0.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert units_with_receipt(store.root) == {1}
    assert "a unit was not written: no room for unit 0" in caplog.text


def test_a_wait_for_whole_units_counts_as_one_for_the_disk(store_tmp: Path) -> None:
    store = _Store(store_tmp / "store")

    def slow(*given: Any, **how: Any) -> Receipt:  # noqa: ANN401
        wait_until(lambda: writers.waited_s["write"] > 0)
        return write_unit(store.root, store.manifest, *given, **how)

    how = (store.root, store.manifest, slow, store.staging)
    with UnitWriters(*how, num_encoders=1) as writers:
        for unit in range(4):
            rows = slice(unit * UNIT_TOKENS, (unit + 1) * UNIT_TOKENS)
            hidden = {tap: store.given.hidden[tap][rows] for tap in store.manifest.taps}
            writers.submit(store.inputs.read(unit), hidden, elapsed_s=0.0)
        writers.collect(waits=True)
    assert writers.waited_s["write"] > 0
