"""Closed streams and Ctrl-C at any instant: the right exit code, and no traceback."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny_train_stores import make_tiny_store

PROGRAM = f"{sys.executable} -m carryon.tools.cli.main"
BENCH = f"{sys.executable} -m carryon.tools.bench"
SMALL = "--width 8 --blocks 1 --heads 2 --intermediate-size 8 --epochs 1 --device cpu"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_store(tmp_path_factory.mktemp("streams") / "store")


def in_shell(script: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", "-c", f"set -o pipefail; {script}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "ends", ["2>&-", ">&- 2>&-", "<&- 2>&-", "2>&1 | head -c 0", "2>/dev/full"]
)
def test_training_without_a_reader_ends_as_always(store: Path, tmp_path: Path, ends: str) -> None:
    result = in_shell(f"{PROGRAM} train --store {store} --out {tmp_path}/run {SMALL} {ends}")

    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert (tmp_path / "run" / "result.json").exists()
    if result.stdout:
        assert json.loads(result.stdout)["num_steps"] > 0  # and nothing but the result


@pytest.mark.parametrize(
    ("ends", "code"), [("| head -c 0", 1), (">&-", 1), ("2>&-", 1), (">/dev/full", 2)]
)
def test_a_failed_check_keeps_its_exit_code_without_a_reader(
    tmp_path: Path, ends: str, code: int
) -> None:
    store = make_tiny_store(tmp_path / "store")
    shards = (store / "hidden" / "final" / "c").rglob("*")
    next(path for path in shards if path.is_file()).write_bytes(b"")

    result = in_shell(f"{PROGRAM} verify {store} {ends}")

    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr


@pytest.mark.parametrize("program", [BENCH, f"{BENCH} store.open --help", f"{PROGRAM} --help"])
def test_help_without_a_reader_is_no_error(program: str) -> None:
    result = in_shell(f"{program} | head -c 0")

    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("ends", ["| head -c 0", ">&-", "2>&-", "2>&1 | head -c 0"])
def test_wrong_input_keeps_its_exit_code_without_a_reader(tmp_path: Path, ends: str) -> None:
    result = in_shell(f"{PROGRAM} verify {tmp_path}/none {ends}")

    assert result.returncode == 2
    assert "Traceback" not in result.stderr


TOLD = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "carryon.tools.cli.program":  # before, Python itself is starting
            os.write(1, b"begun")

sys.meta_path.insert(0, Finder())
from carryon.tools.cli.main import main
sys.exit(main())
"""


@pytest.mark.parametrize("after_s", [0.0, 0.15, 0.4, 0.8, 1.4, 2.2])
def test_ctrl_c_while_it_starts_is_exit_code_130(
    store: Path, tmp_path: Path, after_s: float
) -> None:
    words = f"train --store {store} --out {tmp_path}/run {SMALL} --epochs 100000".split()
    process = subprocess.Popen(
        [sys.executable, "-c", TOLD, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts the tests in the background has them ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    time.sleep(after_s)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=300)

    assert process.returncode in (130, -signal.SIGINT), errors  # a shell shows both as 130
    assert "Traceback" not in errors
