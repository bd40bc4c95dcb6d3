"""Log messages and results of commands."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from carryon.tools.cli.main import main
from carryon.tools.cli.output import log_to_stderr

logger = logging.getLogger("carryon.anything")


def test_a_message_is_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with log_to_stderr("info"):
        logger.debug("not shown")
        logger.info("done")
        logger.warning("strange")
    logger.info("after it")
    assert capsys.readouterr() == ("", "done\nwarning: strange\n")


def test_a_nested_command_keeps_the_outer_level(capsys: pytest.CaptureFixture[str]) -> None:
    with log_to_stderr("warning"), log_to_stderr("info"):
        logger.info("not shown")
    assert capsys.readouterr().err == ""


def test_only_the_main_process_logs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with log_to_stderr("debug"):
        logger.warning("not shown")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["--quiet"], ["--log-level", "warning"]])
def test_a_quiet_command_prints_only_its_result(
    words: list[str], store_original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(store_original), *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert json.loads(captured.out)["is_sound"]


def test_a_log_file_is_readable(
    tmp_path: Path, tiny_base_folder: Path, store_data: Path, store_tmp: Path
) -> None:
    words = ["extract", "--base", str(tiny_base_folder), "--data", str(store_data)]
    command = [sys.executable, "-m", "carryon.tools.cli.main", *words]
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(
            [*command, "--out", str(store_tmp / "store")],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            timeout=120,
        )
    text = (tmp_path / "log").read_text(encoding="ascii")  # the blocks of a bar are not ASCII
    assert "\r" not in text
    assert "it/s" not in text
    assert json.loads(text.splitlines()[-1])["is_finished"]


def test_the_library_prints_nothing_by_itself(
    tiny_base_folder: Path, store_data: Path, store_tmp: Path
) -> None:
    program = (
        "import sys\n"
        "from carryon.cache import extract, verify\n"
        "extract(base=sys.argv[1], data=sys.argv[2], out=sys.argv[3], device='cpu')\n"
        "assert verify(sys.argv[3]).is_complete\n"
    )
    places = [str(tiny_base_folder), str(store_data), str(store_tmp / "store")]
    command = [sys.executable, "-c", program, *places]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
