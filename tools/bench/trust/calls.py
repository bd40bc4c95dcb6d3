"""Commands of carryon in processes that can be killed, limited and watched.

A process is forked from one that has imported everything, so a command starts in a tenth of a
second. What it changes on the disk is seen by an audit hook (PEP 578) before it happens: a kill
comes before the change of a given number, which makes it the same on every machine.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carryon.tools.bench.processes import processes

_CHANGES = {
    "os.rename": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.chmod": 1,
    "os.chown": 1,
    "os.utime": 1,
}
"""Events that change the disk: how many of their first arguments are paths."""
_WITH_HANDLE = {"os.mkdir", "os.remove", "os.rmdir"}
"""Events whose last argument may be the handle of the folder that a path is relative to."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_KILLED = -signal.SIGKILL


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What stops a command."""

    kill_at: int = 0
    """Kill it before the change to the disk of this number, counted from 1. 0: never."""
    kill_after_s: float = 0.0
    """Kill it after so long. 0: never."""
    pause_at: int = 0
    """Let it wait before the change to the disk of this number until `Call.go_on`. 0: never."""
    file_bytes: int = 0
    """Refuse larger files, as `ulimit -f` does. 0: no limit."""
    seconds: float = 120.0
    """It hangs if it takes longer, and is killed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a command ended."""

    words: Sequence[str]
    code: int
    """Exit code; minus the number of the signal that ended it."""
    out: str
    err: str
    seconds: float
    is_hung: bool
    changes: list[str] = field(default_factory=list)
    """Each change to the disk, as far as it ended by itself: the event and its absolute paths."""
    peak_mb: float = 0.0
    """Most memory it had, 10^6 bytes; 0 if it was killed."""

    @property
    def was_killed(self) -> bool:
        """Whether it was killed."""
        return self.code == _KILLED

    @property
    def has_traceback(self) -> bool:
        """Whether it ended as a bug does."""
        return "Traceback (most recent call last)" in self.err or self.code not in (
            0,
            1,
            2,
            130,
            _KILLED,
        )

    @property
    def last_line(self) -> str:
        """The last line on stderr."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""

    @property
    def is_refusal(self) -> bool:
        """Whether it ended with exit code 2 and its reason in one line, the last of stderr."""
        return self.code == 2 and not self.has_traceback and "error: " in self.last_line


class Call:
    """A command that runs, or a function of Python in its place."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        cwd: Path,
        own: Path | None = None,
        limits: Limits = Limits(),  # noqa: B008 -- frozen
        function: Callable[[], object] | None = None,
    ) -> None:
        """Start it.

        Args:
            words: behind `carryon`.
            cwd: folder in which it runs.
            own: folder of its `home`, its `tmp`, and of notes about it. None: `cwd`.
            limits: what stops it.
            function: called instead of the command, with no arguments; it can be pickled.
        """
        self._words, self._limits = list(words), limits
        own = own or cwd
        self._notes = own / "notes" / str(time.monotonic_ns())
        self._notes.mkdir(parents=True)
        for name in ("home", "tmp"):
            (own / name).mkdir(exist_ok=True)
        self._started_at = time.perf_counter()
        self._process = processes().Process(
            target=_run, args=(self._words, function, cwd, self._notes, limits)
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.exitcode is None

    def wait_for_pause(self) -> bool:
        """Return whether it waits, as soon as it does or has ended."""
        while self._process.exitcode is None:
            if (self._notes / "paused").exists():
                return True
            time.sleep(0.005)
        return False

    def go_on(self) -> None:
        """End its pause."""
        (self._notes / "go on").touch()

    def wait(self) -> Ended:
        """Return how it ended; a hanging one is killed."""
        limits, is_hung = self._limits, False
        if limits.kill_after_s:
            self._process.join(limits.kill_after_s)
        else:
            self._process.join(limits.seconds)
            is_hung = self._process.exitcode is None
        self._process.kill()
        self._process.join()
        seconds = time.perf_counter() - self._started_at
        report: dict[str, Any] = {}
        place = self._notes / "report.json"
        if place.exists():
            report = json.loads(place.read_bytes())
        return Ended(
            words=self._words,
            code=report.get("code", self._process.exitcode),
            out=_text(self._notes / "out"),
            err=_text(self._notes / "err"),
            seconds=seconds,
            is_hung=is_hung,
            changes=report.get("changes", []),
            peak_mb=report.get("peak_mb", 0.0),
        )


def call(
    words: Sequence[str],
    *,
    cwd: Path,
    own: Path | None = None,
    limits: Limits = Limits(),  # noqa: B008 -- frozen
) -> Ended:
    """Run a command to its end; arguments as those of `Call`."""
    return Call(words, cwd=cwd, own=own, limits=limits).wait()


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _run(
    words: Sequence[str],
    function: Callable[[], object] | None,
    cwd: Path,
    notes: Path,
    limits: Limits,
) -> None:
    """Run a command in this process, which then ends."""
    import torch

    from carryon.tools.cli.main import main

    torch.set_num_threads(1)
    _direct(cwd, notes)
    changes: list[str] = []
    _watch(changes, limits, notes)
    if limits.file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, resource.RLIM_INFINITY))
    try:
        if function is not None:
            function()
            code = 0
        else:
            code = main(words)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    report = {"code": code, "changes": changes, "peak_mb": peak_mb}
    (notes / "report.json").write_text(json.dumps(report), encoding="utf-8")
    os._exit(0)


def _direct(cwd: Path, notes: Path) -> None:
    """Let the process stand in `cwd`, write to files, and keep its own files below `cwd`."""
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(notes / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    os.chdir(cwd)
    own = notes.parent.parent
    home, temporary = str(own / "home"), str(own / "tmp")
    os.environ |= {"HOME": home, "TMPDIR": temporary, "CARRYON_CACHE": f"{home}/cache"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "MPLCONFIGDIR": f"{home}/plots"}


def _watch(changes: list[str], limits: Limits, notes: Path) -> None:
    """Note each change to the disk before it happens; end or stop the process before one."""

    def see(event: str, arguments: tuple[Any, ...]) -> None:
        paths = changed_paths(event, arguments)
        if not paths or paths[0].startswith(str(notes)):
            return
        changes.append(" ".join([event, *paths]))
        if len(changes) == limits.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(changes) == limits.pause_at:
            (notes / "paused").touch()
            while not (notes / "go on").exists():
                time.sleep(0.005)

    sys.addaudithook(see)


def changed_paths(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """Return the absolute paths that an audit event is about to change."""
    if event == "open":
        path, _, flags = arguments
        names = [] if not flags & _WRITES or str(path) == os.devnull else [path]
    else:
        names = list(arguments[: _CHANGES.get(event, 0)])
    folder = "."
    if names and event in _WITH_HANDLE and arguments[-1] not in (None, -1):
        folder = os.readlink(f"/proc/self/fd/{arguments[-1]}")
    paths = [
        os.path.abspath(os.path.join(folder, os.fsdecode(name)))
        for name in names
        if not isinstance(name, int)
    ]
    is_there = event == "os.mkdir" and os.path.isdir(paths[0])  # then nothing is made
    return [] if is_there else paths
