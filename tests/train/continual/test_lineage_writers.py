"""One writer a lineage; killed or moved, the same call ends with the same bits."""

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_bases import make_tiny_base
from support.tiny_runs import (
    TINY,
    assert_same_bits,
    begin_update,
    folder_bytes,
    without_plots,
    write_texts,
)

from carryon.cache.errors import StoreBusyError
from carryon.tools.cli.main import main
from carryon.train.continual.lineage import update
from carryon.train.continual.lineage_dir import open_lineage
from carryon.train.continual.rebase import rebase
from carryon.train.continual.versions import list_versions

SETTINGS = TINY.with_options(min_lr_ratio=0.1)
NUM_KILLS = 4  # of the renames of an update; more than that in fact


@pytest.fixture(autouse=True, scope="module")
def no_plots() -> Iterator[None]:
    """Drawing takes longer than tiny runs."""
    with without_plots():
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    return [write_texts(folder / f"{number}.jsonl") for number in range(2)]


@pytest.fixture(scope="module")
def grown(
    texts: list[Path], tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """A lineage after one update and after two."""
    root = tmp_path_factory.mktemp("grown")
    for number, path in enumerate(texts, 1):
        update(root / "2", data=path, base=tiny_base_folder, settings=SETTINGS)
        if number == 1:
            shutil.copytree(root / "2", root / "1")
    return [root / "1", root / "2"]


def test_of_two_updates_one_works_and_the_other_exits_with_2_naming_the_process(
    grown: list[Path],
    texts: list[Path],
    tiny_base_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = Path(shutil.copytree(grown[0], tmp_path / "lineage"))
    first = begin_update(root, texts[1], tiny_base_folder, SETTINGS)
    _stop_once_locked(first, root)
    try:
        for argv in (
            ["--data", str(texts[1]), "--base", str(tiny_base_folder)],
            ["--store", str(root / "store")],
        ):
            assert main(["update", "--lineage", str(root), *argv]) == 2
            shown = capsys.readouterr().err.strip().splitlines()
            assert f"{root}: process {first.pid} is writing to this lineage. Fix: " in shown[-1]
        with pytest.raises(StoreBusyError, match=f"process {first.pid}"):
            rebase(root, old_lineage=grown[1], base="unused")
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.join()

    assert first.exitcode == 0
    assert_same_bits(open_lineage(root).version(2).root, open_lineage(grown[1]).version(2).root)
    assert not (root / ".lock").exists()


def test_the_lock_of_a_killed_update_does_no_harm(
    grown: list[Path], texts: list[Path], tiny_base_folder: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(grown[0], tmp_path / "lineage"))
    killed = begin_update(root, texts[1], tiny_base_folder, SETTINGS)
    _stop_once_locked(killed, root)
    killed.kill()
    killed.join()
    assert (root / ".lock").exists()

    update(root, data=texts[1], base=tiny_base_folder, settings=SETTINGS)

    assert_same_bits(open_lineage(root).version(2).root, open_lineage(grown[1]).version(2).root)
    assert not (root / ".lock").exists()


@pytest.mark.parametrize("is_first", [True, False])
def test_an_update_killed_at_any_rename_ends_with_the_same_bits(
    is_first: bool, grown: list[Path], texts: list[Path], tiny_base_folder: Path, tmp_path: Path
) -> None:
    data, finished = (texts[0], grown[0]) if is_first else (texts[1], grown[1])
    expected = open_lineage(finished).version(1 if is_first else 2).root
    picks, number = random.Random(is_first), 0
    for attempt in range(100):
        number += picks.randint(1, 8) + 4 * attempt
        root = tmp_path / f"{number}"
        if not is_first:
            shutil.copytree(grown[0], root)
        child = begin_update(root, data, tiny_base_folder, SETTINGS, dies_at=number)
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == 9
        report = update(root, data=data, base=tiny_base_folder, settings=SETTINGS)
        assert report.carryon == str(root / "versions" / expected.name / "carryon")
        assert_same_bits(root / "versions" / expected.name, expected)
        assert _names(root) == _names(finished)
    assert attempt >= NUM_KILLS


def test_a_killed_update_returns_its_report_once_all_is_written(
    grown: list[Path], texts: list[Path], tiny_base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", str(texts[1]), "--base", str(tiny_base_folder)]
    before = folder_bytes(grown[1])

    assert main(["update", "--lineage", str(grown[1]), *argv]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["carryon"] == str(grown[1] / "versions/0002/carryon")
    assert folder_bytes(grown[1]) == before


@pytest.mark.parametrize("is_old", [False, True])
def test_a_moved_lineage_works(
    is_old: bool, grown: list[Path], texts: list[Path], tiny_base_folder: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(grown[0], tmp_path / "moved" / "lineage"))
    document = json.loads((root / "lineage.json").read_text())
    assert document["increments"][0]["stores"] == ["store#1"]
    if is_old:  # they named their own store by its absolute path
        document["increments"][0]["stores"] = ["/where/it/was/store#1"]
        del document["sha256"]
        (root / "lineage.json").write_text(json.dumps(document))

    report = update(root, data=texts[1], base=tiny_base_folder, settings=SETTINGS)

    second = open_lineage(root).version(2)
    assert report.carryon == str(second.carryon)
    assert_same_bits(second.root, open_lineage(grown[1]).version(2).root)
    root = root.rename(tmp_path / "again")
    report = update(root, data=texts[0], base=tiny_base_folder, settings=SETTINGS)
    assert report.carryon == str(root / "versions/0001/carryon")
    assert [each.carryon for each in list_versions(root, device="cpu")] == [
        str(root / f"versions/000{number}/carryon") for number in (1, 2)
    ]


def test_texts_inside_a_moved_lineage_are_found_by_its_successor(
    texts: list[Path], tiny_base_folder: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    update(old, data=texts[0], base=tiny_base_folder, settings=SETTINGS)
    inside = Path(shutil.copy(texts[1], old / "texts.jsonl"))
    update(old, data=inside, base=tiny_base_folder, settings=SETTINGS)
    old = old.rename(tmp_path / "moved")

    new, base = tmp_path / "new", make_tiny_base(tmp_path / "other", seed=1)
    report = rebase(new, old_lineage=old, base=base, settings=SETTINGS)

    old, new = old.rename(tmp_path / "old-2"), new.rename(tmp_path / "new-2")
    again = rebase(new, old_lineage=old, base=base, settings=SETTINGS)
    assert again.old_lineage == str(old)
    assert again.carryon == str(new / "versions/0001/carryon")
    assert again.from_old_nll == report.from_old_nll


def _names(root: Path) -> set[str]:
    """Return the paths below a lineage; of checkpoints a killed run may keep one more."""
    paths = {str(path.relative_to(root)) for path in root.rglob("*")}
    return {path for path in paths if "/checkpoints/step-" not in path}


def _stop_once_locked(process: object, root: Path) -> None:
    """Stop a process once it holds the lock of a lineage."""
    pid, is_alive = process.pid, process.is_alive  # type: ignore[attr-defined]
    while is_alive() and not (root / ".lock").exists():
        pass
    os.kill(pid, signal.SIGSTOP)
    while not (root / ".lock").read_text():  # stopped before it wrote its id
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGSTOP)
