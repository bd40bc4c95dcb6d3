"""Several stores are read, split and trained on as one."""

from pathlib import Path

import numpy as np
import pytest
from support.tiny_runs import TINY, assert_same_bits, train_tiny
from support.tiny_train_stores import make_tiny_store

from carryon.cache.errors import InputError
from carryon.cache.store.reader import Store
from carryon.train.data.datasets import open_data
from carryon.train.data.loader import Stream
from carryon.train.data.mixture import MixedStore, open_stores
from carryon.train.data.sampler import plan_epoch
from carryon.train.data.split import sample_units
from carryon.train.inference.evaluate import evaluate
from carryon.train.trainer import finish


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("mix")
    # Units of other sizes, so that a place in one store means another in the mix.
    first = make_tiny_store(root / "first", num_samples=24, unit_tokens=64)
    second = make_tiny_store(
        root / "second", num_samples=40, unit_tokens=96, num_held_out=0, samples_seed=7
    )
    return first, second


@pytest.fixture(autouse=True)
def without_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "plot_curves", lambda metrics, path: False)


def _mix(folders: tuple[Path, Path], *weights: float) -> MixedStore:
    store = open_stores([str(folder) for folder in folders], weights)
    assert isinstance(store, MixedStore)
    return store


def test_a_batch_of_a_mix_holds_the_rows_of_its_stores(folders: tuple[Path, Path]) -> None:
    mixed = _mix(folders, 2, 1)
    windows = plan_epoch(
        np.arange(mixed.num_samples),
        lengths=mixed.sample_lengths,
        units=sample_units(mixed),
        seed=(0,),
        epoch=0,
        tokens_per_step=60,
        micro_batch_tokens=0,
        window_units=3,
        kinds=mixed.sample_kinds,
    )
    plain = {str(folder): Store.open(folder) for folder in folders}
    seen = 0
    with Stream(mixed, windows, taps=["final"], settings=TINY.stream, is_pinned=False) as steps:
        for batch in (batch for step in steps for batch in step):
            ends = np.cumsum(batch.lengths)
            for sample, length, end in zip(batch.samples, batch.lengths, ends, strict=True):
                folder, _, name = mixed.sample_id(int(sample)).rpartition(":")
                rows = plain[folder].read_sample(name)
                actual = batch.tokens[end - length : end].numpy()
                np.testing.assert_array_equal(actual, rows.tokens)
                bits = batch.states["final"][end - length : end].view(dtype=_int16()).numpy()
                np.testing.assert_array_equal(bits, rows.hidden["final"].view(np.int16))
                seen += 1
    assert seen == 24 + 24 + 40


def _int16() -> object:
    import torch

    return torch.int16


def test_a_sample_of_a_mix_is_read_from_its_own_store(folders: tuple[Path, Path]) -> None:
    mixed = _mix(folders, 2, 1)
    plain = {str(folder): Store.open(folder) for folder in folders}
    assert len(mixed) == mixed.num_samples == 24 + 24 + 40
    for index in range(mixed.num_samples):
        name = mixed.sample_id(index)
        folder, _, own_id = name.rpartition(":")
        expected = plain[folder][own_id]
        sample = mixed[index]
        assert (sample.index, sample.id) == (index, name)
        np.testing.assert_array_equal(sample.tokens, expected.tokens)
        np.testing.assert_array_equal(sample.hidden["final"], expected.hidden["final"])
        part = mixed.read_sample(index, taps=[], start=1, stop=3)
        np.testing.assert_array_equal(part.tokens, expected.tokens[1:3])
        is_repeat = 24 <= index < 48
        assert mixed.index_of(name) == index - 24 * is_repeat
        assert mixed.read_sample(name).index == index - 24 * is_repeat
        assert index in mixed.unit_samples(mixed.unit_of(index))
    assert mixed[-1].id == mixed.sample_id(mixed.num_samples - 1)


def test_iterating_over_a_mix_yields_every_sample_in_order(folders: tuple[Path, Path]) -> None:
    mixed = _mix(folders, 1.5, 1)
    seen = list(mixed)
    assert [sample.index for sample in seen] == list(range(mixed.num_samples))
    assert [sample.id for sample in seen] == [mixed.sample_id(index) for index in range(len(mixed))]
    assert [len(sample.tokens) for sample in seen] == mixed.sample_lengths.tolist()
    assert sum(len(sample.tokens) for sample in seen) == mixed.num_tokens
    for unit, units in zip(mixed.iter_units(), range(mixed.num_units), strict=True):
        assert unit.unit == units
        assert unit.samples == mixed.unit_samples(units)


def test_what_is_not_in_a_mix_is_refused_by_name(folders: tuple[Path, Path]) -> None:
    mixed = _mix(folders, 1, 1)
    known = mixed.sample_id(0).rpartition(":")[2]
    for name in (known, f"{folders[1]}:nobody", "elsewhere:0"):
        with pytest.raises(InputError, match="expected FOLDER:ID of a mixed store"):
            mixed.index_of(name)
    with pytest.raises(InputError, match="a sample from 0 to 63, got 64"):
        mixed.read_sample(64)
    with pytest.raises(IndexError, match="a sample from -64 to 63, got -65"):
        mixed[-65]
    with pytest.raises(InputError, match=f"a unit from 0 to {mixed.num_units - 1}, got 99"):
        mixed.read_unit(99)


def test_repr_of_a_mix_names_its_stores_and_the_head_is_shared(folders: tuple[Path, Path]) -> None:
    mixed, first = _mix(folders, 1, 1), Store.open(folders[0])
    assert repr(mixed) == (
        f"<MixedStore '{folders[0]} + {folders[1]}': 64 samples, {mixed.num_tokens:,} tokens in "
        f"{mixed.num_units} units; taps final, 16 x bfloat16; base {first.base['id']}>"
    )
    for is_mapped in (False, True):
        actual = mixed.head(is_mapped=is_mapped).weight
        np.testing.assert_array_equal(actual, first.head().weight)
    with pytest.raises(InputError, match="expected a store with the base's last blocks"):
        mixed.blocks()
    assert not isinstance(mixed, Store)  # nothing of a single store is inherited
    assert not hasattr(mixed, "manifest")


def test_each_store_is_split_by_itself_and_its_repeats_are_only_trained_on(
    folders: tuple[Path, Path],
) -> None:
    mixed = _mix(folders, 2, 1)

    split = mixed.split(share=0.1, seed=0)

    held_out = {mixed.sample_id(int(sample)) for sample in split.held_out}
    assert len(held_out) == len(split.held_out) == 4 + 4  # as marked; a tenth of 40
    assert len(split.train) == 2 * 20 + 36
    assert held_out.isdisjoint(mixed.sample_id(int(sample)) for sample in split.train)


def test_an_epoch_goes_through_each_store_as_often_as_it_weighs(
    folders: tuple[Path, Path],
) -> None:
    mixed = _mix(folders, 1.5, 0.25)
    train = mixed.split(share=0.1, seed=0).train

    epochs = [mixed.epoch_samples(train, seed=(0,), epoch=epoch) for epoch in range(4)]

    for epoch in epochs:
        stores = [mixed.sample_id(int(sample)).rpartition(":")[0] for sample in epoch]
        assert stores.count(str(folders[0])) == 20 + 10
        assert stores.count(str(folders[1])) == 9
    quarters = [set(epoch[mixed.sample_kinds[epoch] == 2].tolist()) for epoch in epochs]
    assert len(set.union(*quarters)) == 36  # four epochs, four other quarters


def test_windows_hold_units_of_every_store(folders: tuple[Path, Path]) -> None:
    data = open_data([str(folder) for folder in folders], TINY.with_options(window_units=4))
    store = data.store
    assert isinstance(store, MixedStore)
    unit_kinds = dict(zip(sample_units(store).tolist(), store.sample_kinds.tolist(), strict=True))

    for windows in data.plan(TINY.optimization):
        for window in windows[:-1]:
            assert {unit_kinds[unit] for unit in window.units} == {0, 1}


def test_a_carryon_of_a_mix_is_trained_and_knows_both_held_out_halves(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    report = train_tiny(folders, tmp_path / "run", store_weights=[2.0, 1.0])

    assert report.carryon_nll < report.base_nll
    assert report.held_out_samples == 4 + 2
    again = train_tiny(folders, tmp_path / "again", store_weights=[2.0, 1.0])
    assert_same_bits(tmp_path / "again", tmp_path / "run")
    assert again.carryon_nll == report.carryon_nll
    for folder, number in zip(folders, (4, 2), strict=True):
        actual = evaluate(store=str(folder), carryon=report.carryon, device="cpu")
        assert (actual.samples, actual.num_samples) == ("held-out", number)


def test_other_weights_are_another_run(folders: tuple[Path, Path], tmp_path: Path) -> None:
    train_tiny(folders, tmp_path / "run", store_weights=[2.0, 1.0])

    with pytest.raises(InputError, match=r"store_weights is \[2.0, 1.0\] there and \[1.0, 1.0\]"):
        train_tiny(folders, tmp_path / "run", store_weights=[1.0, 1.0])


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"width": 8}, "stores that are mixed have one width: expected 16 .* got 8"),
        ({"taps": ("final", "layer.1")}, r"one taps: expected \['final'\] .* 'layer.1'"),
        ({"seed": 1}, "one head: expected"),
    ],
)
def test_stores_that_do_not_fit_are_refused_with_both_values(
    folders: tuple[Path, Path], tmp_path: Path, changes: dict[str, object], text: str
) -> None:
    other = make_tiny_store(tmp_path / "other", **changes)  # type: ignore[arg-type]

    with pytest.raises(InputError, match=text):
        train_tiny([folders[0], other], tmp_path / "run")

    assert not (tmp_path / "run").exists()


def test_the_number_of_weights_must_equal_the_number_of_stores(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="store_weights: expected 2 as there are stores, got 3"):
        train_tiny(folders, tmp_path / "run", store_weights=[1.0, 1.0, 1.0])


def test_a_store_given_twice_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected each folder once"):
        train_tiny([folders[0], folders[0]], tmp_path / "run")
