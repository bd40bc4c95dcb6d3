"""Runs through a folder of decoded states: the bits of runs without it, whatever happens to it."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.decoded_caches import files_of
from support.small_disks import PAGE, pages_used, resize
from support.tiny_runs import (
    TINY,
    Killed,
    assert_same_bits,
    begin_tiny,
    kill_at,
    metrics_without_times,
    train_tiny,
    without_plots,
)
from support.tiny_train_stores import make_tiny_store

from carryon.cache.errors import InputError
from carryon.cache.store.reader import Store
from carryon.tools.cli.main import main
from carryon.train import StoreDataset
from carryon.train.continual.lineage import update
from carryon.train.inference.evaluate import evaluate
from carryon.train.trainer.sweep import sweep


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two stores of one base."""
    root = tmp_path_factory.mktemp("decoded")
    return [
        make_tiny_store(root / f"store-{number}", samples_seed=number, num_samples=30)
        for number in (1, 2)
    ]


@pytest.fixture(scope="module")
def plain(stores: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a decoded cache."""
    out = tmp_path_factory.mktemp("plain") / "run"
    with without_plots():
        train_tiny(stores[0], out)
    return out


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARRYON_CACHE", str(tmp_path / "own"))


def test_runs_end_with_the_same_bits_and_later_ones_decode_nothing(
    stores: list[Path], plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    cache = tmp_path / "cache"
    first, second = (
        train_tiny(stores[0], tmp_path / name, decoded_cache=str(cache)) for name in ("one", "two")
    )

    for name in ("one", "two"):
        assert_same_bits(tmp_path / name, plain)
        assert metrics_without_times(tmp_path / name) == metrics_without_times(plain)
    num_units = Store.open(stores[0]).num_units
    assert len(files_of(cache)) == num_units
    assert first.decoded_cache["misses"] == first.decoded_cache["written"] == num_units
    assert second.decoded_cache["misses"] == second.decoded_cache["refused"] == 0
    assert second.decoded_cache["hits"] == first.decoded_cache["hits"] + num_units > num_units
    assert json.loads((tmp_path / "two" / "result.json").read_text())["decoded_cache"] == dict(
        second.decoded_cache
    )
    assert f"decoded cache: {cache}, at most 50 GB" in caplog.text
    assert json.loads((plain / "result.json").read_text())["decoded_cache"] == {}


def test_a_killed_run_may_be_resumed_with_or_without_it(
    stores: list[Path], plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        with pytest.raises(Killed):
            train_tiny(stores[0], tmp_path / "run", decoded_cache=str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        kill_at(patch, 2)
        with pytest.raises(Killed):
            train_tiny(stores[0], tmp_path / "run")
    train_tiny(
        stores[0], tmp_path / "run", decoded_cache=str(tmp_path / "cache"), decoded_cache_gb=1.0
    )
    assert_same_bits(tmp_path / "run", plain)


def test_a_sweep_of_several_stores_reads_all_of_them_through_it(
    stores: list[Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"settings": TINY, "vary": ["seed=1,2"], "store_weights": [2.0, 1.0]}
    paths = [str(store) for store in stores]
    with without_plots():
        sweep(paths, out=tmp_path / "plain", **options)
        cached = sweep(paths, out=tmp_path / "cached", decoded_cache=str(tmp_path / "c"), **options)
    for name in ("seed=1", "seed=2"):
        assert_same_bits(tmp_path / "cached" / name, tmp_path / "plain" / name)
    num_units = sum(Store.open(store).num_units for store in stores)
    assert cached[0].decoded_cache["written"] == len(files_of(tmp_path / "c")) == num_units


def test_processes_at_one_folder_at_once_end_with_the_bits_of_their_runs(
    stores: list[Path], plain: Path, tmp_path: Path
) -> None:
    train_tiny(stores[1], tmp_path / "plain-2")
    options: dict[str, Any] = {"decoded_cache": str(tmp_path / "cache")}
    processes = [
        begin_tiny(store, tmp_path / name, tmp_path / "own", **options)
        for name, store in (("a", stores[0]), ("b", stores[1]), ("c", stores[0]))
    ]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    for name, expected in (("a", plain), ("b", tmp_path / "plain-2"), ("c", plain)):
        assert_same_bits(tmp_path / name, expected)
    assert files_of(tmp_path / "cache")


def test_an_update_of_a_lineage_and_an_evaluation_use_it(
    stores: list[Path], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    settings = TINY.with_options(schedule="knee", min_lr_ratio=0.1)
    with without_plots():
        update(lineage=str(tmp_path / "plain"), store=[str(stores[0])], settings=settings)
        cached = settings.with_options(decoded_cache=str(cache))
        update(lineage=str(tmp_path / "cached"), store=[str(stores[0])], settings=cached)
        assert len(files_of(cache)) == Store.open(stores[0]).num_units
        # A later update may leave it out: it decides nothing.
        for name in ("plain", "cached"):
            update(lineage=str(tmp_path / name), store=[str(stores[1])], settings=settings)
    paths = [sorted((tmp_path / name).rglob("carryon.safetensors")) for name in ("plain", "cached")]
    assert len(paths[0]) == len(paths[1]) > 1
    for one, two in zip(*paths, strict=True):
        assert one.read_bytes() == two.read_bytes()
    reports = [
        evaluate(stores[0], carryon=paths[0][0].parent, device="cpu", **options)
        for options in ({}, {"decoded_cache": str(cache)})
    ]
    assert reports[0].to_dict() == reports[1].to_dict()


def test_a_data_set_gives_the_same_batches(stores: list[Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_tokens": 30, "window_units": 2}
    plain = StoreDataset(stores[0], **options)
    cached = StoreDataset(stores[0], decoded_cache=str(tmp_path / "cache"), **options)
    for epoch in range(2):
        plain.set_epoch(epoch)
        cached.set_epoch(epoch)
        for one, two in zip(plain, cached, strict=True):
            assert torch.equal(one["hidden"]["final"], two["hidden"]["final"])
            assert torch.equal(one["input_ids"], two["input_ids"])
    assert cached.store.decoded is not None  # type: ignore[union-attr]
    facts = cached.store.decoded.facts()  # type: ignore[union-attr]
    assert facts["hits"] == facts["misses"] == facts["written"] == cached.store.num_units


def test_a_full_disk_does_not_stop_a_run(
    stores: list[Path],
    plain: Path,
    tmp_path: Path,
    small_disk: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for room in (2, 1):
        resize(small_disk, (pages_used(small_disk) + room) * PAGE)
        report = train_tiny(
            stores[0], tmp_path / f"run-{room}", decoded_cache=str(small_disk / "cache")
        )
        assert_same_bits(tmp_path / f"run-{room}", plain)
        assert len(files_of(small_disk / "cache")) < Store.open(stores[0]).num_units
        assert report.decoded_cache == {} or report.decoded_cache["misses"] > 0
    assert 1 <= sum("the disk is full" in line for line in caplog.messages) <= 2


def test_a_folder_of_something_else_is_one_line(
    stores: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--store", str(stores[0]), "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*words, "--decoded-cache", str(stores[0])]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--decoded-cache: expected an empty folder or a decoded cache" in error
    assert not os.path.lexists(tmp_path / "run")
    with pytest.raises(InputError, match="decoded_cache_gb: expected more than 0"):
        TINY.with_options(decoded_cache_gb=0.0)
