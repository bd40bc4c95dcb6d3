"""Samples that belong together are in one half; preference pairs are read, not trained on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_bases import CHAT_TEMPLATE
from support.tiny_runs import TINY, train_tiny
from support.tiny_stores import extract_tiny

from carryon.cache.base.model import Base
from carryon.cache.corpus.samples import hash_id
from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings
from carryon.cache.store.reader import Store
from carryon.train.config import StreamSettings
from carryon.train.continual.lineage import update
from carryon.train.data.datasets import open_data, split_store
from carryon.train.data.mixture import MixedStore, open_stores
from carryon.train.data.store_dataset import StoreDataset
from carryon.train.inference.evaluate import evaluate
from carryon.train.trainer.sweep import sweep

PAIRS = [
    {"id": f"pair-{n}", "prompt": f"{n} is", "chosen": " the thing", "rejected": " an ice"}
    for n in range(8)
]
TEXTS = [{"id": f"long-{n}", "text": "on an ice is the thing " * 12} for n in range(4)]


@pytest.fixture(scope="module")
def pairs(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pairs") / "store"
    extract_tiny(tiny_base, PAIRS, root)
    return root


@pytest.fixture(scope="module")
def pieces(tiny_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four texts, each in several pieces."""
    root = tmp_path_factory.mktemp("pieces") / "store"
    extract_tiny(tiny_base, TEXTS, root, corpus=CorpusSettings(max_tokens=32))
    return root


def test_both_answers_of_a_pair_are_stored_and_read_as_one_group(pairs: Path) -> None:
    store = Store.open(pairs)
    assert store.manifest.parts[0].kinds == {"preference pair": 16}
    roles: dict[int, list[int]] = {}
    for group, role in zip(store.sample_groups, store.sample_roles, strict=True):
        roles.setdefault(int(group), []).append(int(role))
    assert set(roles) == {hash_id(f"pair-{n}") for n in range(8)}
    assert all(sorted(each) == [1, 2] for each in roles.values())
    assert len(store[0].hidden["final"]) == len(store[0].tokens)
    assert len(list(StoreDataset(pairs, batch_tokens=64))) > 0, "its own loops may read it"


TRAIN: dict[str, Callable[[Path, Path], Any]] = {
    "train": lambda store, out: train_tiny(store, out),
    "sweep": lambda store, out: sweep(
        store=store, out=out, vary=["learning_rate=1e-3,1e-2"], settings=TINY
    ),
    "update": lambda store, out: update(out, store=store, settings=TINY),
    "evaluate": lambda store, out: evaluate(store, carryon=out / "carryon"),
}


@pytest.mark.parametrize("call", TRAIN.values(), ids=TRAIN)
def test_training_and_evaluation_on_pairs_are_refused(
    call: Callable[[Path, Path], Any], pairs: Path, pieces: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    if call is TRAIN["evaluate"]:
        train_tiny(pieces, out)
    with pytest.raises(
        InputError, match="expected samples to train on, got 16 halves of preference pairs. Fix"
    ):
        call(pairs, out)


def test_all_pieces_of_a_text_are_in_one_half(pieces: Path) -> None:
    store = Store.open(pieces)
    assert store.num_samples > 2 * len(TEXTS)
    for seed in range(4):
        split = split_store(store, StreamSettings(data_seed=seed, held_out_ratio=0.25))
        halves = [set(store.sample_groups[rows].tolist()) for rows in (split.train, split.held_out)]
        assert not halves[0] & halves[1]
        assert len(halves[1]) == 1


def test_a_mix_has_the_groups_and_roles_of_its_stores(
    pairs: Path, pieces: Path, tiny_base: Base
) -> None:
    mix = open_stores([str(pieces), str(pairs)], [1, 1])
    assert isinstance(mix, MixedStore)
    stores = mix.stores
    np.testing.assert_array_equal(
        mix.sample_groups, np.concatenate([store.sample_groups for store in stores])
    )
    np.testing.assert_array_equal(
        mix.sample_roles, np.concatenate([store.sample_roles for store in stores])
    )
    with pytest.raises(InputError, match="got 16 halves of preference pairs"):
        open_data([str(pieces), str(pairs)], TINY)


def test_turns_of_a_conversation_that_the_template_rewrites_are_one_group(
    tiny_base: Base, tmp_path: Path
) -> None:
    """As those do that cut thinking from earlier turns: only the newest answer has a note."""
    note = "{{ '(sure) ' if loop.last and message['role'] == 'assistant' else '' }}"
    before = "{{ message['content'] }}"
    template = CHAT_TEMPLATE.replace(before, note + before)
    assert template != CHAT_TEMPLATE
    chat = [
        {"role": "user", "content": "is it"},
        {"role": "assistant", "content": "the thing"},
        {"role": "user", "content": "on an ice"},
        {"role": "assistant", "content": "it is"},
    ]
    rows = [{"id": f"chat-{n}", "messages": chat} for n in range(3)]
    extract_tiny(tiny_base, rows, tmp_path / "s", corpus=CorpusSettings(chat_template=template))
    store = Store.open(tmp_path / "s")
    assert store.num_samples == 6
    assert len(set(store.sample_groups.tolist())) == 3
    assert {store.sample_id(row) for row in range(6)} == {
        f"chat-{n}@{turn}" for n in range(3) for turn in (1, 3)
    }
