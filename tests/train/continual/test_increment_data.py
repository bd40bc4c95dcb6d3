"""A path that holds other data than an increment's is refused before anything is written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import TINY, assert_same_bits, folder_bytes, without_plots
from support.tiny_train_stores import make_tiny_store

from carryon.cache.errors import CarryOnError, MissingError
from carryon.cache.store.reader import Store
from carryon.tools.cli.main import main
from carryon.train.continual.lineage import release, update
from carryon.train.continual.lineage_dir import open_lineage
from carryon.train.continual.rebase import rebase
from carryon.train.continual.versions import list_versions

SETTINGS = TINY.with_options(min_lr_ratio=0.1)


def _rebuild(root: Path, store: Path) -> object:
    return release(open_lineage(root), 1, settings=SETTINGS, out=root.parent / "again")


def _rebase(root: Path, store: Path) -> object:
    return rebase(root.parent / "new", old_lineage=root, base="unused")


CONSUMERS: dict[str, Callable[[Path, Path], object]] = {
    "update": lambda root, store: update(root, store=store),
    "versions": lambda root, store: list_versions(root, device="cpu"),
    "rebuild": _rebuild,
    "rebase": _rebase,
}


@pytest.fixture
def monthly(tmp_path: Path) -> tuple[Path, Path, str]:
    """A lineage after its first update, the path of its store, and the store's fingerprint."""
    store = make_tiny_store(tmp_path / "store", samples_seed=1)
    with without_plots():
        update(tmp_path / "lineage", store=store, settings=SETTINGS)
    return tmp_path / "lineage", store, Store.open(f"{store}#1").fingerprint


@pytest.mark.parametrize("name", CONSUMERS)
def test_another_store_at_the_path_of_an_increment_is_refused_by_name(
    name: str, monthly: tuple[Path, Path, str]
) -> None:
    root, store, expected = monthly
    shutil.rmtree(store)
    found = Store.open(make_tiny_store(store, samples_seed=2)).fingerprint
    before = folder_bytes(root.parent)

    with pytest.raises(CarryOnError) as raised:
        CONSUMERS[name](root, store)

    [line] = str(raised.value).splitlines()
    for part in (
        f"{store}#1: expected",
        expected[:12],
        f"got other data (fingerprint {found[:12]}",
    ):
        assert part in line
    assert ". Fix: " in line
    assert folder_bytes(root.parent) == before


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_missing_store_of_an_increment_is_one_line(
    name: str, monthly: tuple[Path, Path, str], tmp_path: Path
) -> None:
    root, store, expected = monthly
    shutil.rmtree(store)
    other = make_tiny_store(tmp_path / "other", samples_seed=2)
    before = folder_bytes(root.parent)

    with pytest.raises(MissingError) as raised:
        CONSUMERS[name](root, other)

    [line] = str(raised.value).splitlines()
    assert f"{store}#1: expected the data of increment 1" in line
    assert f"{expected[:12]}), found none. Fix: " in line
    assert folder_bytes(root.parent) == before


def test_the_monthly_command_exits_with_2_and_goes_on_once_the_store_is_back(
    monthly: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, store, _ = monthly
    old = store.rename(tmp_path / "january")
    make_tiny_store(store, samples_seed=2)
    argv = ["update", "--lineage", str(root), "--config", str(root / "config.yaml")]
    argv += ["--device", "cpu", "--store", str(store)]

    assert main(argv) == 2
    assert "got other data" in capsys.readouterr().err

    march = store.rename(tmp_path / "march")
    old.rename(store)
    with without_plots():
        assert main([*argv[:-1], str(march)]) == 0
        for each in (store, march):
            update(tmp_path / "straight", store=each, settings=SETTINGS)
    second = open_lineage(root).version(2).root
    assert_same_bits(second, open_lineage(tmp_path / "straight").version(2).root)


def test_an_unfinished_version_is_not_finished_on_other_data(
    monthly: tuple[Path, Path, str], tmp_path: Path
) -> None:
    root, store, _ = monthly
    (root / "versions/0001/result.json").unlink()
    shutil.rmtree(store)
    make_tiny_store(store, samples_seed=2)
    before = folder_bytes(root)

    with pytest.raises(CarryOnError, match="got other data"):
        update(root, store=store)

    assert folder_bytes(root) == before


def test_a_finished_tail_of_the_trunk_needs_its_data_no_more(
    monthly: tuple[Path, Path, str], tmp_path: Path
) -> None:
    root, store, _ = monthly
    with without_plots():
        update(root, store=make_tiny_store(tmp_path / "2", samples_seed=2))
        shutil.rmtree(store)
        report: Any = update(root, store=make_tiny_store(tmp_path / "3", samples_seed=3))

    assert report.carryon == str(open_lineage(root).version(3).carryon)
