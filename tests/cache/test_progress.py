"""Progress of long loops: log lines off a terminal, a bar on one, silence unless configured."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from carryon.cache import progress as progress_module
from carryon.cache.progress import Progress, track

pty = pytest.importorskip("pty", reason="terminals of this kind are POSIX only")
termios = pytest.importorskip("termios")

PROGRAM = """
import time
from carryon.cache.progress import Progress
from carryon.tools.cli.output import log_to_stderr
import logging
with log_to_stderr("{level}"), Progress(40, name="work", unit="steps") as progress:
    for number in range(40):
        time.sleep(0.03)
        progress.update()
        if number == 20:
            logging.getLogger("carryon.cache.anything").info("a message in the middle")
"""


class Clock:
    """Stands in for the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


def run_loop(clock: Clock, *, steps: int, step_s: float) -> None:
    with Progress(steps, name="work", unit="steps") as progress:
        for number in range(steps):
            clock.now += step_s
            progress.note = f"loss {number}"
            progress.update()


def test_a_log_gets_a_line_every_tenth(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="carryon")
    run_loop(clock, steps=100, step_s=0.5)
    assert len(caplog.messages) == 10
    assert caplog.messages[0] == "work: 10% (10 of 100), 2.00 steps/s, 00:45 left, loss 9"
    assert caplog.messages[-1] == "work: 100% (100 of 100), 2.00 steps/s, 00:00 left, loss 99"


def test_a_slow_loop_gets_a_line_every_ten_seconds(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="carryon")
    run_loop(clock, steps=1000, step_s=5.0)
    assert len(caplog.messages) == 500
    assert caplog.messages[0] == "work: 0% (2 of 1000), 0.20 steps/s, 1:23:10 left, loss 1"


def test_a_fast_loop_gets_one_line_a_second_at_most(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="carryon")
    run_loop(clock, steps=1000, step_s=0.003)
    assert len(caplog.messages) == 2  # at 1 s and 2 s; the end is only as far away again
    caplog.clear()
    run_loop(clock, steps=10, step_s=0.05)
    assert caplog.messages == []


def test_bytes_are_shown_in_millions(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="carryon")
    with Progress(3e6, name="tokenize", unit="B") as progress:
        clock.now += 10
        progress.update(1_500_000)
    assert caplog.messages == ["tokenize: 50% (1.50M of 3.00M), 150k B/s, 00:10 left"]


def test_nothing_is_shown_unless_logging_is_configured(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    run_loop(clock, steps=10, step_s=60)
    assert capfd.readouterr() == ("", "")


def test_other_processes_than_the_first_are_silent(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="carryon")
    monkeypatch.setenv("RANK", "1")
    run_loop(clock, steps=10, step_s=60)
    assert caplog.messages == []


def test_track_yields_the_items() -> None:
    assert list(track("abc", total=3, name="work", unit="letters")) == ["a", "b", "c"]


def run_on_terminal(level: str) -> str:
    """Return all that the program writes to a terminal."""
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(level=level)],
        stderr=terminal,
    ) as process:
        os.close(terminal)
        output = b""
        try:
            while block := os.read(reader, 65536):
                output += block
        except OSError:  # Linux: the other end is closed
            pass
        process.wait(timeout=20)
    os.close(reader)
    return output.decode()


def test_a_terminal_gets_a_bar_that_messages_do_not_tear() -> None:
    output = run_on_terminal("info")
    assert "work: 100%|" in output
    [line] = [line for line in output.split("\n") if "a message" in line]
    assert line.rstrip("\r").rpartition("\r")[2] == "a message in the middle"


def test_a_bar_obeys_the_level() -> None:
    assert run_on_terminal("warning") == ""


def test_a_file_gets_plain_lines(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        subprocess.run(
            [sys.executable, "-c", PROGRAM.format(level="info")], stderr=log, check=True, timeout=20
        )
    lines = (tmp_path / "log").read_bytes().decode("ascii")
    assert "\r" not in lines
    assert "a message in the middle\n" in lines
    assert "work: " in lines
