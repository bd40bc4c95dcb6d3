"""The process that runs vLLM, in its own environment: a line each way, a log, and its end.

It ends with this process, however that ends: it notices that its standard input is closed. Requests
and answers are not here.
"""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from carryon.cache.errors import InputError, MissingExtraError
from carryon.cache.files.atomic import remove_anything

_SIDE = Path(__file__).resolve().parent / "vllm_side"
_ERROR = re.compile(r"(?:[\w.]*(?:Error|Exception)): .*")
_LONGEST_REASON = 400
_TAIL_BYTES = 1 << 20
"""Of a log that is searched for the reason of an end."""
_ENVIRONMENT = {
    # On a CPU threads are as many as OMP_NUM_THREADS says, wherever the system puts them.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What is set unless the user has set it."""
_REQUIRED = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the process that is fed
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a token is asked for behind a sample of full length
}
PYTHON_VARIABLE = "CARRYON_VLLM_PYTHON"
END_S = 10.0
"""Seconds that it has to end by itself."""


def find_python(asked: str, *, what: str = "--backend vllm", fix: str = "") -> str:
    """Return the Python that has vLLM.

    Args:
        asked: by the user. Empty: that of the environment variable, or this one.
        what: needs it.
        fix: how it is named. Empty: --vllm-python.

    Raises:
        InputError: there is no such program.
        MissingExtraError: none is named, and vLLM is not installed here.
    """
    name, fix = "--vllm-python" if asked else PYTHON_VARIABLE, fix or "add --vllm-python"
    if python := asked or os.environ.get(PYTHON_VARIABLE, ""):
        if (found := shutil.which(Path(python).expanduser())) is None:
            raise InputError(
                f"{name}: expected the Python of the environment that has vLLM, got {python!a:.200}"
                f", which is no program. Fix: {name}{' ' if asked else '='}ENV/bin/python"
            )
        return str(found)
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError(
            f"{what} needs the package 'vllm' of the extra 'vllm', which is not installed: "
            "vLLM and this package want different versions of transformers, so run python -m venv "
            f"ENV; ENV/bin/pip install vllm, and {fix} ENV/bin/python"
        )
    return sys.executable


def vllm_environment() -> dict[str, str]:
    """Return the environment variables that vLLM gets besides those of this process."""
    return {name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()} | _REQUIRED


class VllmProcess:
    """A started driver of vLLM; `end`, then `clear`."""

    def __init__(self, python: str, *, driver: str) -> None:
        """Start it.

        Args:
            python: of vLLM's environment.
            driver: name of its program, in vllm_side.

        Raises:
            InputError: it cannot be run; nothing is left.
        """
        # vLLM leaves files where temporary ones go, and a killed process cannot remove its own.
        self.temporary = Path(tempfile.mkdtemp(prefix="carryon-vllm-"))
        """Folder for its temporary files, and the log."""
        self.log = self.temporary / "log"
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONHOME", "VIRTUAL_ENV")
        }
        environment["PYTHONPATH"] = str(_SIDE)  # packages of this environment are not for that one
        environment["TMPDIR"] = str(self.temporary)
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [python, str(_SIDE / driver)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=environment,
                    start_new_session=True,  # Ctrl-C ends this process, which ends that one
                )
        except OSError as error:
            self.clear(keeps_log=False)
            raise InputError(
                f"--vllm-python: expected a program that can be run, got {python}: "
                f"{error.strerror}. Fix: --vllm-python ENV/bin/python"
            ) from error

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    @property
    def lines(self) -> IO[bytes]:
        """Its standard output, a JSON line each."""
        assert self._process.stdout is not None
        return self._process.stdout

    def say(self, message: Mapping[str, Any]) -> None:
        """Write a line to its standard input.

        Raises:
            BrokenPipeError: it has ended.
        """
        assert self._process.stdin is not None
        line = json.dumps(message).encode("ascii") + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except ValueError as error:  # another thread, which noticed its end, has closed it
            raise BrokenPipeError(f"process {self.pid} has ended") from error

    def last_word(self) -> str:
        """Return the last error in its log, or else the last line."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        reasons = [match[0] for line in lines if (match := _ERROR.search(line))]
        return one_line((reasons or [line for line in lines if line.strip()] or ["no word"])[-1])

    def end(self, *, after_s: float) -> None:
        """Close its standard input, which ends it; kill it, and what it has started, after a while.

        Args:
            after_s: seconds that it has to end by itself.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(after_s)
        self.kill()

    def kill(self) -> None:
        """Kill what still runs of it and of the processes that it has started."""
        with suppress(ProcessLookupError, PermissionError):  # none is left
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def clear(self, *, keeps_log: bool) -> None:
        """Remove its temporary files; with `keeps_log` all but the log."""
        if not keeps_log:
            shutil.rmtree(self.temporary, ignore_errors=True)
            return
        for path in self.temporary.iterdir():
            if path != self.log:
                remove_anything(path)


def one_line(text: object) -> str:
    """Return a text of vLLM as one line of limited length."""
    return " ".join(str(text).split())[:_LONGEST_REASON]
