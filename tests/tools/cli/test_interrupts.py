"""Ctrl-C in an import and in a callback, where Python would lose it. Each command is a process."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PRESSED = """
import os, signal
def press():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # the signal arrives between two of these
        pass
"""
COMMAND = """
import sys, time, weakref
sys.path.insert(0, sys.argv[1])
from carryon.tools.cli.program import Program
from pressed import press

class Thing:
    pass

def command():
    {body}
    print("went on", flush=True)
    for _ in range(60_000):  # what comes once more is waited for
        time.sleep(0.01)

sys.modules["made"] = sys.modules["__main__"]
__name__ = {name!r}
prog = Program(prog="p", about="", closing="", commands={{"run": "made:command"}})
sys.exit(prog.main(["run"]))
"""
LIBRARY = """
from pressed import press
try:
    press()
    print("whole", flush=True)
except BaseException:
    print("an error", flush=True)
"""


def run(folder: Path, body: str, *, name: str = "carryon.tools.made") -> tuple[int, list[str], str]:
    """Run a command and return its exit code, its lines, and what it says of errors."""
    (folder / "pressed.py").write_text(PRESSED)
    (folder / "library.py").write_text(LIBRARY)
    (folder / "twice.py").write_text("from pressed import press\npress()\npress()\n")
    words = [sys.executable, "-c", COMMAND.format(body=body, name=name), str(folder)]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored in the background
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


SAYS = "p run: interrupted. Fix: run the same command to resume\n"


def test_an_import_of_a_command_is_left_at_once(tmp_path: Path) -> None:
    assert run(tmp_path, "import library") == (130, [], SAYS)


def test_an_import_in_the_midst_of_work_is_finished_first(tmp_path: Path) -> None:
    done = run(tmp_path, "import library", name="carryon.train.made")
    assert done == (130, ["whole", "went on"], SAYS)


def test_an_import_is_left_when_it_is_asked_for_again(tmp_path: Path) -> None:
    assert run(tmp_path, "import twice", name="carryon.train.made") == (130, [], SAYS)


@pytest.mark.parametrize("body", ["weakref.finalize(Thing(), press)", "press()"])
def test_ctrl_c_outside_of_imports_is_an_interrupt(tmp_path: Path, body: str) -> None:
    lines = ["went on"] if "finalize" in body else []  # nothing can be raised in a finalizer
    assert run(tmp_path, body) == (130, lines, SAYS)


def test_other_errors_of_callbacks_are_shown(tmp_path: Path) -> None:
    code, lines, errors = run(tmp_path, "weakref.finalize(Thing(), int, 'x'); press()")
    assert (code, lines) == (130, [])
    assert "ValueError" in errors
    assert errors.endswith(SAYS)
