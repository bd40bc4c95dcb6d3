"""The warning about ends of answers that the base finds unlikely."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_runs import train_tiny
from support.tiny_train_stores import make_tiny_store

from carryon.cache.store.reader import Store
from carryon.train.data.batch import Batch
from carryon.train.losses.endings import LAST_TOKENS, MIN_ANSWERS, Endings


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(make_tiny_store(tmp_path / "store", num_held_out=MIN_ANSWERS))


def make_batch(*spans: list[tuple[int, int]], length: int = 60) -> Batch:
    """Return a batch of samples whose targets are tokens `first` to `last` of each span."""
    at = [
        row * length + token - 1
        for row, of_sample in enumerate(spans)
        for first, last in of_sample
        for token in range(first, last + 1)
    ]
    return Batch(
        samples=np.arange(len(spans)),
        lengths=np.full(len(spans), length),
        states={},
        tokens=torch.zeros(length * len(spans), dtype=torch.int32),
        positions=torch.tensor(at),
        targets=torch.zeros(len(at), dtype=torch.int64),
    )


def total(*values: float) -> list[float]:
    return list(values)


def answers(store: Store, losses: list[float], *, first: int = 5, count: int = 12) -> str:
    """Return the warning about equal answers with these losses."""
    endings = Endings()
    batch = make_batch(*[[(first, first + len(losses) - 1)]] * count)
    endings.add(np.tile(np.array(losses), count), batch)
    return endings.warning(store, total=total)


def test_an_unlikely_stop_token_draws_a_warning_that_names_a_sample(store: Store) -> None:
    line = answers(store, [1.0] * 19 + [5.0])
    assert "unlikely: 5.0 nats at the stop token, 1.0 before it, such as tokens 16 to 24" in line
    assert any(f"of sample {store.sample_id(row)}, which carryon" in line for row in range(12))
    assert "\n" not in line


def test_an_unlikely_marker_draws_a_warning(store: Store) -> None:
    line = answers(store, [1.0] * 11 + [4.0] * LAST_TOKENS + [0.5])
    assert "4.0 nats at the last 8 tokens, 1.0 before them" in line


@pytest.mark.parametrize(
    "losses",
    [[1.0] * 20, [1.0] * 19 + [2.4], [3.0] * 19 + [4.0], [5.0, 0.1], [9.0]],
    ids=["even", "low", "as the rest", "stop expected", "stop alone"],
)
def test_likely_ends_draw_none(store: Store, losses: list[float]) -> None:
    assert not answers(store, losses)


def test_whole_texts_and_few_answers_draw_none(store: Store) -> None:
    losses = [1.0] * 19 + [15.0]
    assert not answers(store, losses, first=1)
    assert not answers(store, losses, count=MIN_ANSWERS - 1)
    assert not Endings().warning(store, total=total)


def test_each_turn_of_a_conversation_is_an_answer(store: Store) -> None:
    endings = Endings()
    batch = make_batch(*[[(4, 13), (20, 29)]] * 5)
    endings.add(np.tile([1.0] * 9 + [6.0], 10), batch)
    assert endings.sums[0] == 10
    assert endings.sums[1] == 60.0
    assert {each[2:] for each in endings.ends} == {(5, 13), (21, 29)}
    assert "6.0 nats at the stop token" in endings.warning(store, total=total)


def test_samples_side_by_side_are_told_apart(store: Store) -> None:
    endings = Endings()
    endings.add(np.ones(120), make_batch([(58, 59)], *[[(1, 59)]] * 2))
    assert endings.sums[0] == 1


def test_a_new_run_warns_once_with_the_bases_own_losses(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Endings] = []

    def unlikely(endings: Endings, *_: object, **__: object) -> str:
        seen.append(endings)
        return "the base finds the ends of answers unlikely"

    monkeypatch.setattr(Endings, "warning", unlikely)
    with caplog.at_level(logging.WARNING, logger="carryon"):
        report = train_tiny(Path(store.root), tmp_path / "run")
        train_tiny(Path(store.root), tmp_path / "run")
    assert caplog.text.count("the ends of answers unlikely") == 1
    [endings] = seen
    assert endings.sums[0] == report.held_out_samples
    losses, counts = endings.sums[1::2].sum(), endings.sums[2::2].sum()
    assert counts == report.held_out_targets
    assert losses / counts == pytest.approx(report.base_nll, rel=1e-5)


def test_where_few_answers_are_held_out_those_of_the_training_half_count_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Endings] = []

    def silent(endings: Endings, *_: object, **__: object) -> str:
        seen.append(endings)
        return ""

    monkeypatch.setattr(Endings, "warning", silent)
    few = make_tiny_store(tmp_path / "few", num_held_out=MIN_ANSWERS - 1)
    train_tiny(few, tmp_path / "run", epochs=1)
    texts = make_tiny_store(tmp_path / "texts", num_held_out=2, first_target=1)
    report = train_tiny(texts, tmp_path / "text-run", epochs=1)
    answered, whole = seen
    assert answered.sums[0] == 24
    assert whole.sums[0] == 0
    assert json.loads((tmp_path / "text-run/metrics.jsonl").read_text().splitlines()[0])[
        "held_out_nll"
    ] == pytest.approx(report.base_nll)
