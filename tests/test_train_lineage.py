"""carryon.train.lineage: releases that leave the trunk as it is, and can be made again."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import TINY, assert_same_bits
from tiny_train_stores import make_tiny_store

from carryon.cache.errors import InputError
from carryon.train import live_run
from carryon.train.checkpoint import newest_checkpoint
from carryon.train.lineage import Lineage, read_lineage, release, update
from carryon.train.loop import Job, train_jointly
from carryon.train.metrics import read_metrics
from carryon.train.paths import path_rate
from carryon.train.piece import Piece, digest_of_state
from carryon.train.sweep import change
from carryon.train.versions import list_versions

SETTINGS = change(TINY, {"final_share": 0.1, "log_every": 1, "dropout": 0.2})


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny products on several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("stores")
    return [str(make_tiny_store(root / f"{seed}", samples_seed=seed)) for seed in (1, 2, 3)]


def _update_all(root: str, stores: list[str]) -> None:
    for store in stores:
        update(lineage=root, store=[store], settings=SETTINGS)


@pytest.fixture(scope="module")
def grown(stores: list[str], tmp_path_factory: pytest.TempPathFactory) -> Lineage:
    root = tmp_path_factory.mktemp("grown") / "lineage"
    _update_all(str(root), stores)
    found = read_lineage(root)
    assert found is not None
    return found


def test_the_trunk_ends_as_one_that_never_branched(
    grown: Lineage, stores: list[str], tmp_path: Path
) -> None:
    start = None
    for version, store in enumerate(stores[:2], 1):
        steps = grown.increments[version - 1].steps
        piece = Piece(
            paradigm="trunk",
            version=version,
            ends=tuple(grown.ends[:version]),
            alpha=grown.alpha,
            first=0,
            stop=steps,
            offset=grown.ends[version - 1] - steps,
            start=start,
        )
        out = tmp_path / str(version)
        train_jointly([store], [Job(out=str(out), settings=SETTINGS, piece=piece)])
        start = newest_checkpoint(out / "checkpoints")
        tail = newest_checkpoint(grown.tail(version).checkpoints)
        assert start is not None
        assert tail is not None
        assert digest_of_state(tail) == digest_of_state(start)


def test_every_version_took_the_learning_rates_of_its_path(grown: Lineage) -> None:
    for version in (1, 2, 3):
        lines = read_metrics(grown.head(version).metrics) + read_metrics(
            grown.version(version).metrics
        )
        rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
        first = grown.ends[version - 1] - grown.increments[version - 1].steps
        assert rates == [
            path_rate(
                step,
                paradigm="switch",
                version=version,
                ends=grown.ends,
                alpha=0.6,
                settings=SETTINGS.optimization,
            )
            for step in range(first, grown.ends[version - 1])
        ]
        assert rates[-1] == 0.02 * 0.1


def test_a_version_made_again_has_the_same_bits(grown: Lineage, tmp_path: Path) -> None:
    release(grown, 2, settings=SETTINGS, out=tmp_path / "again")

    assert_same_bits(tmp_path / "again", grown.version(2).root)


@pytest.mark.parametrize("last_step", [1, 9, 14, 19])
def test_an_interrupted_update_goes_on_to_the_same_bits(
    grown: Lineage,
    stores: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    last_step: int,
) -> None:
    taken = 0

    def stop_after(*args: Any, **options: Any) -> Any:  # noqa: ANN401 -- as take_step
        nonlocal taken
        taken += 1
        if taken > last_step:
            raise KeyboardInterrupt
        return real(*args, **options)

    real = live_run.take_step
    root = str(tmp_path / "lineage")
    with monkeypatch.context() as patch:
        patch.setattr(live_run, "take_step", stop_after)
        with pytest.raises(KeyboardInterrupt):
            _update_all(root, stores[:2])
    found = read_lineage(root)
    assert found is not None
    _update_all(root, stores[len(found.increments) - 1 : 2])

    assert_same_bits(found.version(2).root, grown.version(2).root)


def test_an_update_without_new_data_is_refused(grown: Lineage, stores: list[str]) -> None:
    with pytest.raises(InputError, match="expected new data, got a store that the lineage has"):
        update(lineage=str(grown.root), store=[stores[1]], settings=SETTINGS)


def test_a_schedule_changed_in_mid_lineage_is_refused(grown: Lineage, tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store", samples_seed=9)

    with pytest.raises(InputError, match="first update, got schedule cosine -> knee"):
        update(
            lineage=str(grown.root),
            store=[str(store)],
            settings=change(SETTINGS, {"schedule": "knee"}),
        )


def test_a_store_of_another_base_is_refused(
    grown: Lineage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_tiny_store(tmp_path / "store", samples_seed=9)
    other = replace(grown, base={"id": "other", "weights_sha256": "1" * 64})
    monkeypatch.setattr("carryon.train.lineage.read_lineage", lambda root: other)

    with pytest.raises(InputError, match="expected a store of the lineage's base .'id': 'other'"):
        update(lineage=str(grown.root), store=[str(store)], settings=SETTINGS)


def test_fewer_steps_than_alpha_allows_leave_no_lineage(stores: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="alpha: expected 0.05 of the increment's"):
        update(lineage=str(tmp_path / "new"), store=[stores[0]], settings=SETTINGS, alpha=0.05)

    assert not (tmp_path / "new").exists()


def test_versions_are_listed_with_their_cost_and_losses(grown: Lineage) -> None:
    found = list_versions(str(grown.root), device="cpu")

    assert [version.version for version in found] == [1, 2, 3]
    assert [len(version.held_out_nlls) for version in found] == [3, 3, 3]
    for version in found:
        report = json.loads(grown.version(version.version).result.read_text())
        own = version.held_out_nlls[version.version - 1]
        assert own == pytest.approx(report["carryon_nll"], rel=1e-6)
    assert found[0].steps_so_far == found[0].scratch_steps == found[0].path_steps
    assert _steps_taken(grown) == found[2].steps_so_far
    assert (grown.root / "paths.png").exists()


def _steps_taken(lineage: Lineage) -> int:
    steps = 0
    for path in lineage.root.glob("*/*/metrics.jsonl"):
        steps += sum("loss" in line for line in read_metrics(path))  # log_every is 1
    return steps
