"""Requests to an engine: how it is asked, how long a file is waited for, when to ask again.

An engine computes the states of a prompt and writes them to a file in a folder that both sides see.
"""

import fcntl
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from threading import Event
from typing import Protocol, TypeVar

from carryon.cache.errors import EngineError
from carryon.cache.exchange.state_file import LOCK_SUFFIX, SUFFIX
from carryon.cache.files.regular import open_below

Key = TypeVar("Key")
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.002, 0.25
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_FILE_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,200}}{re.escape(SUFFIX)}")


class Engine(Protocol):
    """Computes states of prompts."""

    folder: Path
    """Of the files of states."""
    version: str
    """Of vLLM."""

    def submit(self, tokens: list[int]) -> Future[str]:
        """Ask for the states of token ids; the result is the name of a file that is whole."""

    def discard(self, name: str) -> None:
        """Remove a file that was read. Those that are never read go when the engine ends."""


def retry_waits(retries: int) -> list[float]:
    """Return the seconds to wait before each repetition of a request: doubled up to a limit."""
    return [min(_FIRST_WAIT_S * 2**number, _LONGEST_WAIT_S) for number in range(retries)]


def request_ahead(
    engine: Engine, prompts: Iterable[tuple[Key, list[int]]], *, num_ahead: int
) -> Iterator[tuple[Key, str]]:
    """Yield each key with the name of the file of its prompt, in order.

    Args:
        engine: to ask.
        prompts: key and token ids of each.
        num_ahead: most prompts that are asked for and whose file is not yet taken.

    Raises:
        EngineError: the engine failed; requests that are under way are given up.
    """
    source, waiting = iter(prompts), deque[tuple[Key, Future[str]]]()
    try:
        while True:
            while len(waiting) < num_ahead and (each := next(source, None)) is not None:
                waiting.append((each[0], engine.submit(each[1])))
            if not waiting:
                return
            key, future = waiting.popleft()
            yield key, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def file_name(path: object) -> str:
    """Return the name of a file from the path that an engine told; only the name is used.

    Raises:
        EngineError: it is no name of a file of states.
    """
    name = path.rpartition("/")[2] if isinstance(path, str) else ""
    if not _FILE_NAME.fullmatch(name):
        raise EngineError(
            f"vLLM: expected the name of a file of states, got {path!a:.80}. Fix: serve the base "
            "with the connector that docs/exchange.md shows"
        )
    return name


def wait_for_file(
    folder: Path, name: str, *, timeout_s: float, is_over: Event | None = None
) -> bool:
    """Wait until a file is there and its writer has released its lock; tell whether it is.

    An engine tells the name of a file before it has written it.

    Args:
        folder: of the file.
        name: of the file.
        timeout_s: most seconds to wait.
        is_over: ends the wait too.
    """
    is_over = is_over or Event()
    stop, look_s = time.monotonic() + timeout_s, _FIRST_LOOK_S
    while not _is_written(folder, name):
        if time.monotonic() >= stop or is_over.wait(look_s):
            return False
        look_s = min(2 * look_s, _LONGEST_LOOK_S)
    return True


def _is_written(folder: Path, name: str) -> bool:
    try:
        os.close(open_below(folder, name))
    except FileNotFoundError:
        return False
    try:
        lock = open_below(folder, name + LOCK_SUFFIX)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def remove_states(folder: Path, name: str) -> None:
    """Remove a file of states that was read, and its lock."""
    for each in (name, name + LOCK_SUFFIX):
        (folder / each).unlink(missing_ok=True)
