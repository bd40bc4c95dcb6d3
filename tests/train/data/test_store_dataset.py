"""A store as a torch dataset: what batches hold, who reads which, and exact resume.

The store has 24 samples in a few units; batches of 30 tokens hold two to five of them.
"""

import pickle
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_train_stores import make_tiny_store
from torch.utils.data import DataLoader

from carryon.cache.errors import InputError
from carryon.cache.store.reader import Store
from carryon.train import StoreDataset
from carryon.train.data import store_dataset
from carryon.train.data.sampler import Window

TAPS = ["final", "layer.1"]
OPTIONS: dict[str, Any] = {"batch_tokens": 30, "window_units": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("dataset") / "store", taps=TAPS)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dataset") / "other"
    return make_tiny_store(root, taps=TAPS, samples_seed=7, num_samples=9)


def samples_of(batches: Iterable[dict[str, Any]]) -> list[int]:
    return [sample for batch in batches for sample in batch["sample_ids"].tolist()]


def assert_equal(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs)
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            if name != "hidden":
                assert torch.equal(value, two[name]), name
        for tap, states in one["hidden"].items():
            assert torch.equal(states, two["hidden"][tap]), tap


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_holds_the_tokens_states_and_targets_of_its_samples(
    folder: Path, shuffle: bool
) -> None:
    store, dataset = Store.open(folder), StoreDataset(folder, shuffle=shuffle, **OPTIONS)
    batches = list(dataset)

    assert len(batches) == len(dataset)
    assert sorted(samples_of(batches)) == list(range(24))
    assert (samples_of(batches) == list(range(24))) is not shuffle
    for batch in batches:
        assert len(batch["input_ids"]) <= 30
        assert batch["cu_seqlens"].dtype == torch.int32
        assert list(batch["hidden"]) == TAPS
        bounds = batch["cu_seqlens"].tolist()
        for sample, first, stop in zip(
            batch["sample_ids"].tolist(), bounds[:-1], bounds[1:], strict=True
        ):
            rows = store.read_sample(sample)
            assert batch["input_ids"][first:stop].tolist() == rows.tokens.tolist()
            assert batch["position_ids"][first:stop].tolist() == list(range(stop - first))
            labels = np.where(rows.loss_mask == 1, rows.tokens, -100)
            labels[0] = -100
            assert batch["labels"][first:stop].tolist() == labels.tolist()
            for tap in TAPS:
                states = batch["hidden"][tap][first:stop]
                assert states.dtype == torch.bfloat16
                bits = states.view(torch.int16).numpy().view(np.uint16)
                np.testing.assert_array_equal(bits, rows.hidden[tap])


def test_padded_batches_are_the_flat_ones(folder: Path) -> None:
    flat, padded = (list(StoreDataset(folder, padded=each, **OPTIONS)) for each in (False, True))

    for one, two in zip(flat, padded, strict=True):
        mask = two["attention_mask"].bool()
        assert mask.sum(1).tolist() == one["cu_seqlens"].diff().tolist()
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(two[name][mask], one[name])
        for tap, states in one["hidden"].items():
            assert two["hidden"][tap].dtype == states.dtype
            assert torch.equal(two["hidden"][tap][mask], states)
            assert not two["hidden"][tap][~mask].any()
        assert set(two["labels"][~mask].tolist()) <= {-100}
        assert torch.equal(one["sample_ids"], two["sample_ids"])


def test_only_the_chosen_taps_are_read(folder: Path) -> None:
    assert list(next(iter(StoreDataset(folder, taps=["layer.1"], **OPTIONS)))["hidden"]) == [
        "layer.1"
    ]
    batch = next(iter(StoreDataset(folder, taps=[], **OPTIONS)))
    assert batch["hidden"] == {}
    assert len(batch["input_ids"])


def test_the_halves_are_those_of_training(folder: Path) -> None:
    halves = [samples_of(StoreDataset(folder, split=each)) for each in ("train", "held_out")]

    assert sorted(halves[1]) == np.flatnonzero(Store.open(folder).sample_held_out).tolist()
    assert len(halves[1]) == 4
    assert sorted(halves[0] + halves[1]) == list(range(24))


def test_each_epoch_has_its_order_and_repeats_it(folder: Path) -> None:
    dataset = StoreDataset(folder, **OPTIONS)
    first = samples_of(dataset)
    assert samples_of(dataset) == first
    dataset.set_epoch(1)
    second = samples_of(dataset)
    dataset.set_epoch(0)

    assert second != first == samples_of(dataset)
    assert sorted(second) == sorted(first)
    assert samples_of(StoreDataset(folder, seed=1, **OPTIONS)) != first


def test_windows_are_planned_as_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Window] = []
    plan = store_dataset.iter_store_epoch

    def watched(*args: Any, **options: Any) -> Iterator[Window]:  # noqa: ANN401
        for window in plan(*args, **options):
            planned.append(window)
            yield window

    monkeypatch.setattr(store_dataset, "iter_store_epoch", watched)
    dataset = StoreDataset(folder, batch_tokens=30, window_units=1)
    next(iter(dataset))
    read = len(planned)
    as_read = list(dataset)
    assert 0 < read < len(as_read)
    assert len(as_read) == len(dataset)
    assert_equal(as_read, list(dataset))  # from the list that the length needs


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
def test_all_ranks_and_workers_see_every_sample_once(folder: Path) -> None:
    alone = list(StoreDataset(folder, **OPTIONS))
    seen: dict[int, list[dict[str, Any]]] = {}
    for rank in range(3):
        dataset = StoreDataset(folder, rank=rank, world_size=3, **OPTIONS)
        loader = DataLoader(dataset, batch_size=None, num_workers=2)
        seen[rank] = list(loader)
        assert len(seen[rank]) == len(loader) == len(dataset)
        assert_equal(seen[rank], list(dataset))  # workers keep the order

    merged = [seen[number % 3][number // 3] for number in range(len(alone))]
    assert_equal(merged, alone)
    assert sorted(samples_of(merged)) == list(range(24))


def test_the_rank_comes_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    ours = StoreDataset(folder, **OPTIONS)

    assert_equal(list(ours), list(StoreDataset(folder, rank=1, world_size=2, **OPTIONS)))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_resumed_at_a_random_point_has_the_same_batches(
    folder: Path, world_size: int, workers: int
) -> None:
    options = OPTIONS | {"rank": world_size - 1, "world_size": world_size}
    dataset = StoreDataset(folder, **options)
    dataset.set_epoch(2)
    batches = list(dataset)
    for stop in random.Random(world_size).sample(range(len(batches)), 3):
        iterator = iter(dataset)
        for _ in range(stop):
            next(iterator)
        state = pickle.loads(pickle.dumps(dataset.state_dict()))

        resumed = StoreDataset(folder, **options)
        resumed.load_state_dict(state)
        resumed.set_epoch(2)  # the present one: changes nothing
        loader = DataLoader(resumed, batch_size=None, num_workers=workers)
        assert_equal(list(loader), batches[stop:])
        if not workers:
            assert_equal(list(resumed), batches)  # the next pass is whole


def test_the_state_of_a_worker_is_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        id, num_workers = 1, 3

    batches = list(StoreDataset(folder, **OPTIONS))
    with monkeypatch.context() as patch:
        patch.setattr(store_dataset, "get_worker_info", lambda: Info)
        dataset = StoreDataset(folder, **OPTIONS)
        iterator = iter(dataset)
        assert_equal([next(iterator)], batches[1:2])
        resumed = StoreDataset(folder, **OPTIONS)
        resumed.load_state_dict(dataset.state_dict())
        assert_equal(list(resumed), batches[4::3])
        assert_equal(list(resumed), batches[1::3])
        resumed.load_state_dict(dataset.state_dict())

    with pytest.raises(InputError, match="saved by worker 1 of 3, got no worker"):
        next(iter(resumed))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_tokens": 31}, "batch_tokens is 30 there and 31 here"),
        ({"rank": 0, "world_size": 2}, "world_size is 1 there and 2 here"),
        ({"seed": 3}, "seed is 0 there and 3 here"),
        ({"split": "train"}, "split is 'all' there and 'train' here"),
    ],
)
def test_a_state_of_other_settings_is_refused_with_both_values(
    folder: Path, changes: dict[str, Any], text: str
) -> None:
    state = StoreDataset(folder, **OPTIONS).state_dict()

    with pytest.raises(InputError, match=text):
        StoreDataset(folder, **OPTIONS | changes).load_state_dict(state)


def test_a_state_of_another_store_is_refused(folder: Path, other: Path) -> None:
    state = StoreDataset(folder, **OPTIONS).state_dict()

    with pytest.raises(InputError, match=r"store_fingerprint is '\w+' there and '\w+' here"):
        StoreDataset(other, **OPTIONS).load_state_dict(state)


@pytest.mark.parametrize("shuffle", [True, False])
def test_several_stores_are_mixed(folder: Path, other: Path, shuffle: bool) -> None:
    dataset = StoreDataset([folder, other], shuffle=shuffle, **OPTIONS)
    samples = samples_of(dataset)

    assert sorted(samples) == list(range(24 + 9))
    ids = {dataset.store.sample_id(sample) for sample in samples}
    assert {f"{folder}:sample-0", f"{other}:sample-8"} <= ids
    twice = samples_of(StoreDataset([folder, other], store_weights=[2, 1], **OPTIONS))
    assert len(twice) == 2 * 24 + 9


def test_an_open_store_is_taken_too(folder: Path) -> None:
    assert_equal(
        list(StoreDataset(Store.open(folder), **OPTIONS)), list(StoreDataset(folder, **OPTIONS))
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"taps": ["layer.9"]},
            "taps: expected some of final, layer.1, .* got layer.9",
        ),
        ({"split": "test"}, "split: expected all, train or held_out, got test"),
        ({"batch_tokens": 0}, "batch_tokens: expected 1 or more, got 0"),
        ({"rank": 2, "world_size": 2}, "rank: expected 0 to world_size - 1, got 2 of 2"),
        ({"reader_thread": 2}, "no setting reader_thread: did you mean reader_threads"),
        ({"host_memory_gb": 1e-9}, "host_memory_gb: expected 1e-05 or more"),
    ],
)
def test_wrong_options_are_refused(folder: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        StoreDataset(folder, **options)


def test_an_iteration_that_ends_early_stops_its_threads(folder: Path) -> None:
    import threading

    before = threading.active_count()
    iterator = iter(StoreDataset(folder, **OPTIONS))
    next(iterator)
    assert threading.active_count() > before
    iterator.close()  # type: ignore[attr-defined]  # a generator

    assert threading.active_count() == before


def test_a_probe_learns_from_hidden_states(folder: Path) -> None:
    """Does a layer know whether the next token is odd? 20 lines, as a newcomer would write it."""
    from carryon.train import StoreDataset

    data = StoreDataset(folder, taps=["layer.1"], batch_tokens=256, split="train")
    held_out = StoreDataset(folder, taps=["layer.1"], split="held_out", shuffle=False)
    probe = torch.nn.Linear(data.store.width, 2)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.01)

    def logits_and_answers(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        states, labels = batch["hidden"]["layer.1"][:-1].float(), batch["labels"][1:]
        is_target = labels != -100
        return probe(states[is_target]), labels[is_target] % 2

    for epoch in range(30):
        data.set_epoch(epoch)
        for batch in data:
            loss = torch.nn.functional.cross_entropy(*logits_and_answers(batch))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    logits, answers = logits_and_answers(next(iter(held_out)))
    accuracy = (logits.argmax(1) == answers).float().mean()

    assert accuracy > 0.5
