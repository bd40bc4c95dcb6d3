"""One writer a run folder: a second one is refused, and a killed one leaves no harm."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.tiny_runs import TINY, assert_same_bits, begin, train_tiny
from support.tiny_train_stores import make_tiny_store

from carryon.cache.errors import InputError, StoreBusyError
from carryon.cache.lock import FOLDER_LOCK, folder_lock
from carryon.train.trainer.sweep import sweep

SMALL = [
    *("--width", "8", "--blocks", "1", "--heads", "2", "--intermediate-size", "8"),
    *("--epochs", "40", "--tokens-per-step", "40", "--window-units", "2", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("writers") / "store")


def start(words: Sequence[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "carryon.tools.cli.main", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_of_two_writers_one_trains_and_the_other_names_folder_and_process(
    store: Path, tmp_path: Path, command: str
) -> None:
    out = tmp_path / "out"
    words = [command, "--store", str(store), "--out", str(out), "--quiet", *SMALL]
    if command == "sweep":
        words += ["--vary", "seed=1,2"]

    both = [start(words) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]

    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], errors
    refused = codes.index(2)
    kind = {"train": "run", "sweep": "sweep"}[command]
    [line] = errors[refused].splitlines()
    assert f"{out}: process {both[1 - refused].pid} is writing to this {kind}. Fix: " in line
    assert not list(out.rglob(".*"))


def test_a_lock_left_by_a_kill_does_no_harm(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = begin(store, out, is_sweep=False)
    while not (out / FOLDER_LOCK).exists() and process.is_alive():
        process.join(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    begin(store, out, is_sweep=False).join()

    assert not (out / FOLDER_LOCK).exists()
    begin(store, tmp_path / "whole", is_sweep=False).join()
    assert_same_bits(out, tmp_path / "whole")


def test_nothing_is_read_or_written_in_a_folder_that_another_holds(
    store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with folder_lock(out, kind="run"):
        with pytest.raises(StoreBusyError, match=f"process {os.getpid()} is writing to this run"):
            train_tiny(store, out)
        assert [path.name for path in out.iterdir()] == [FOLDER_LOCK]
    assert not out.exists()
    train_tiny(store, out)
    with folder_lock(out, kind="run"), pytest.raises(StoreBusyError):
        train_tiny(store, out)  # finished, but someone may be removing it


def test_a_sweep_is_refused_where_one_of_its_runs_is_trained(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    with folder_lock(out / "seed=2", kind="run"):
        with pytest.raises(StoreBusyError, match=r"seed=2: process \d+ is writing to this run"):
            sweep(store, out=out, settings=TINY, vary=["seed=1,2"])
        assert [path.name for path in out.iterdir()] == ["seed=2"]


def test_a_lock_that_is_a_link_is_not_followed(store: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FOLDER_LOCK).symlink_to(mine)

    with pytest.raises(InputError, match=r"\.lock: expected a regular file, got something else"):
        train_tiny(store, tmp_path / "run")

    assert mine.read_text() == "precious"


def test_a_lock_that_is_another_file_by_a_hard_link_is_not_emptied(
    store: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FOLDER_LOCK).hardlink_to(mine)

    with pytest.raises(InputError, match="expected a lock with the number of a process"):
        train_tiny(store, tmp_path / "run")

    assert (tmp_path / "run" / FOLDER_LOCK).samefile(mine)
    assert mine.read_text() == "precious"


def test_what_a_killed_writer_left_half_written_is_removed(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_tiny(store, out)
    (out / ".run.json.7.partial").write_text("{")
    (out / ".carryon.partial").mkdir()
    (out / "checkpoints" / ".step-00000003.partial").mkdir()
    (out / "checkpoints" / ".step-00000003.partial" / "carryon.safetensors").write_text("half")
    (out / "checkpoints" / ".last.json.7.partial").write_text("{")

    train_tiny(store, out)

    assert not list(out.rglob("*.partial"))
