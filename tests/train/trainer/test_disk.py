"""A full disk, and a limit on the size of files: one line, and the same call ends as always."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.small_disks import PAGE, file_size_limit, pages_used, resize
from support.tiny_runs import TINY, assert_same_bits, train_tiny, without_plots
from support.tiny_stores import error_of
from support.tiny_train_stores import make_tiny_store

from carryon.cache.errors import DiskFullError
from carryon.tools.cli.main import main
from carryon.train.trainer.sweep import sweep

VARIED = ["seed=1,2"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("disk") / "store")


def train_at(store: Path, out: Path) -> None:
    with without_plots():
        train_tiny(store, out)


def sweep_at(store: Path, out: Path) -> None:
    with without_plots():
        sweep(store, out=out, settings=TINY, vary=VARIED)


@pytest.mark.parametrize(("call", "runs"), [(train_at, [""]), (sweep_at, ["seed=1", "seed=2"])])
def test_a_full_disk_stops_cleanly_and_the_same_call_resumes_to_the_same_bits(
    small_disk: Path,
    store: Path,
    tmp_path: Path,
    call: Callable[[Path, Path], None],
    runs: list[str],
) -> None:
    call(store, tmp_path / "whole")
    out, num_full = small_disk / "out", 0
    for pages in range(1, 400, 3):
        resize(small_disk, (pages + pages_used(small_disk)) * PAGE)
        error = error_of(lambda: call(store, out))
        if not error:
            break
        num_full += 1
        assert error.startswith("DiskFullError")
        assert f"the disk is full while writing {out}" in error
        assert "\n" not in error
        assert not list(out.rglob(".*"))
    assert num_full >= 5
    for name in runs:
        assert_same_bits(out / name, tmp_path / "whole" / name)


def test_a_limit_on_the_size_of_files_is_named_and_more_resumes(
    store: Path, tmp_path: Path
) -> None:
    train_at(store, tmp_path / "whole")
    out = tmp_path / "run"
    for limit in (2, 1_000, 3_000, 5_000, 9_000):
        with file_size_limit(limit), pytest.raises(DiskFullError, match=r"ulimit -f") as caught:
            train_at(store, out)
        assert f"while writing {out}" in str(caught.value)
    train_at(store, out)

    assert_same_bits(out, tmp_path / "whole")


def test_the_command_prints_one_line(
    small_disk: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resize(small_disk, 6 * PAGE)
    small = ["--width", "8", "--blocks", "1", "--heads", "2", "--intermediate-size", "8"]

    words = ["train", "--store", str(store), "--out", str(small_disk / "run"), *small, "--quiet"]
    assert main([*words, "--device", "cpu"]) == 2

    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if not line.startswith("warning: ")] == [lines[-1]]
    assert "the disk is full while writing" in lines[-1]
