"""The `carryon` command: help, errors, exit codes."""

import errno
import logging
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from carryon.cache.errors import DiskFullError, InputError
from carryon.tools.cli.main import CARRYON, main
from carryon.tools.cli.options import options_of
from carryon.tools.cli.output import log_to_stderr
from carryon.tools.cli.program import Program
from carryon.tools.commands import inspect_store as inspect_file

NAMES = sorted(CARRYON.commands)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in NAMES:
        assert f"  {name} " in text
    assert max(map(len, text.splitlines())) <= 86
    assert main([]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_each_command_has_an_example_and_sentences(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: carryon {name} " in text
    assert f"Example:\n    carryon {name} " in text
    for item in options_of(CARRYON.find(name)):
        assert item.help.strip(), f"{item.flag} has no help text"
        assert item.help.strip().endswith("."), f"help of {item.flag} is no sentence"


@pytest.mark.parametrize("name", NAMES)
def test_help_texts_are_aligned(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([name, "--help-all"])
    text = capsys.readouterr().out
    options = re.findall(r"^  (-\S+(?: \S+)*|[A-Z]+)( *)(.*)$", text, re.MULTILINE)
    assert len(options) > 5
    assert all(gap and help_text for _, gap, help_text in options), options
    assert len({len(name) + len(gap) for name, gap, _ in options}) == 1
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in NAMES)])
def test_help_is_instant(argv: list[str]) -> None:
    program = (
        "import sys, time\n"
        "from carryon.tools.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "large = {'torch', 'transformers', 'zarr'} & set(sys.modules)\n"
        "assert not large, large\n"
    )
    # The limit is far above the 0.3 s that it takes, as a test machine may be busy.
    subprocess.run([sys.executable, "-c", program, *argv], check=True, timeout=20)


def test_wrong_input_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "no/such/store"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("carryon inspect: error: no/such/store: ")
    assert captured.err.count("\n") == 1


def test_an_unknown_command_suggests_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["extrct"]) == 2
    assert "did you mean extract?" in capsys.readouterr().err


def test_a_missing_option_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", "--base", "x"]) == 2
    assert capsys.readouterr().err == (
        "carryon extract: error: expected --data, --out, got nothing: see carryon extract --help\n"
    )


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (InputError("one\n  two"), 2, "carryon inspect: error: one two\n"),
        (DiskFullError(errno.ENOSPC, "full at x"), 2, "carryon inspect: error: "),
        (
            OSError(errno.ENOSPC, "No space left on device", "/a/b"),
            2,
            "carryon inspect: error: No space left on device at /a/b. Fix: free some space",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            2,
            "carryon inspect: error: Permission denied at /a/b\n",
        ),
        (
            KeyboardInterrupt(),
            130,
            "carryon inspect: interrupted. Fix: run the same command to resume\n",
        ),
    ],
    ids=["input", "disk full of ours", "disk full", "not allowed", "ctrl-c"],
)
def test_expected_failures_are_one_line(
    raised: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def inspect_store(store: str, /) -> None:
        """Fail."""
        raise raised

    monkeypatch.setattr(inspect_file, "inspect_store", inspect_store)
    assert main(["inspect", "x"]) == code
    error = capsys.readouterr().err
    assert error.startswith(line)
    assert error.count("\n") == 1


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def inspect_store(store: str, /) -> None:
        """Fail."""
        raise RuntimeError("a bug")

    monkeypatch.setattr(inspect_file, "inspect_store", inspect_store)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["inspect", "x"])


@pytest.mark.parametrize("argv", [["--help"], ["inspect", "--help"]])
def test_a_closed_pipe_is_no_error(argv: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "carryon.tools.cli.main", *argv]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=20)
    os.close(writer)
    assert result.stderr == ""


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("carryon 0.")


def test_a_control_character_of_a_file_does_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["verify", "no/\x1b]0;title\x07\x9b2J"]) == 2
    shown = capsys.readouterr().err
    assert r"no/\x1b]0;title\x07\x9b2J" in shown
    with log_to_stderr("info"):
        logging.getLogger("carryon").warning("of a file: \x1b[31mred\r")
    assert capsys.readouterr().err == "warning: of a file: \\x1b[31mred\\r\n"


def refuse(path: str, /, *, max_tokens: int = 3) -> None:
    """Refuse.

    Args:
        path: Where.
        max_tokens: How many.
    """
    raise InputError(f"{path}: expected 2 or more, got {max_tokens}")


@pytest.mark.parametrize(
    ("begins", "shown"),
    [("max_tokens", "--max-tokens"), ("path", "path"), ("rows.jsonl", "rows.jsonl")],
)
def test_an_error_names_a_setting_as_it_is_typed(
    begins: str,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "refusing", SimpleNamespace(refuse=refuse))
    commands = {"refuse": "refusing:refuse"}
    program = Program(prog="tool", about="", closing="", commands=commands)
    assert program.main(["refuse", begins]) == 2
    text = f"tool refuse: error: {shown}: expected 2 or more, got 3\n"
    assert capsys.readouterr().err == text
