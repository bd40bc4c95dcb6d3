"""Leases: files that say which process works on what, seen by every node of a file system.

A lease is made with O_EXCL, so one process gets it; its owner touches it every few seconds. Whoever
sees it untouched for long takes over by making the next of its numbered files, which again only one
can. Clocks of nodes are never compared: a lease is old when its time of change stayed the same
while the own clock ran. Nothing that is written depends on a lease: two owners only cost work.
"""

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Self

from carryon.cache.errors import DamagedStoreError
from carryon.cache.files.atomic import remove_file
from carryon.cache.files.documents import parse_json
from carryon.cache.files.full_disk import disk_full_named
from carryon.cache.files.regular import names_below, open_below, read_below

logger = logging.getLogger(__name__)

_FOLDER = "units"
_NAME = re.compile(r"[.]([a-z]+|0|[1-9][0-9]{0,8})[.]([0-9]{1,3})[.]lease")
_MAX_BYTES = 2000
_MOST_OWNERS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseTimes:
    """How often leases are touched, and when one counts as left by a dead process."""

    heartbeat_s: float = 10.0
    expiry_s: float = 90.0
    """Longer than a file system of a network caches the time of change: 60 s on NFS."""


class Leases:
    """Leases of this process on a store, as a context manager that releases all at its end."""

    def __init__(self, root: Path, times: LeaseTimes | None = None) -> None:
        """Prepare; nothing is written."""
        self.token = secrets.token_hex(8)
        """Names this process in files; the number of a process is not unique among nodes."""
        self._root, self._times = root, times or LeaseTimes()
        self._held: dict[str, str] = {}
        """Name -> path of its file."""
        self._seen: dict[str, tuple[object, float]] = {}
        """Path of another's lease -> its state, and the own clock when that state was new."""
        self._is_over = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._heart.join()
        for name in list(self._held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Take a lease, if it is free or its owner is dead; tell whether that went well.

        Args:
            name: of a unit its number; or a word.

        Raises:
            DiskFullError: no space left for the lease.
        """
        if name in self._held:
            return False
        for number in range(_MOST_OWNERS):
            path = f"{_FOLDER}/.{name}.{number}.lease"
            if self._make(path):
                self._held[name] = path
                return True
            if not self._is_left(path):
                return False
        return False

    def release(self, name: str) -> None:
        """Give a lease back."""
        path = self._held.pop(name)
        with suppress(OSError):  # it expired, and was removed
            (self._root / path).unlink()

    def units_of_others(self) -> set[int]:
        """Return the units of which another process has a lease, or has left one."""
        found = [_NAME.fullmatch(name) for name in names_below(self._root, _FOLDER)]
        names = {match[1] for match in found if match} - self._held.keys()
        return {int(name) for name in names if name.isdecimal()}

    def is_known(self, name: str) -> bool:
        """Return whether there is a lease of this name, whoever has it."""
        found = map(_NAME.fullmatch, names_below(self._root, _FOLDER))
        return any(match is not None and match[1] == name for match in found)

    def clear(self, names: set[str]) -> None:
        """Remove all leases of these names, whoever has them."""
        for name in names_below(self._root, _FOLDER):
            match = _NAME.fullmatch(name)
            if match and match[1] in names:
                remove_file(self._root / _FOLDER / name)

    def mark_ended(self, tokens: Collection[str]) -> None:
        """Let others take the leases of processes that are known to be dead without a wait.

        The files stay: they say which units such a process may have left files of.
        """
        for name in names_below(self._root, _FOLDER):
            if not is_lease(name):
                continue
            try:
                content = read_below(self._root, f"{_FOLDER}/{name}", max_bytes=_MAX_BYTES)
            except (FileNotFoundError, DamagedStoreError):  # given back since; or not a lease
                continue
            if (owner := _owner(content)).get("token") in tokens:
                self._overwrite(f"{_FOLDER}/{name}", owner | {"ended": True})

    def _make(self, path: str) -> bool:
        with disk_full_named(self._root / path):
            try:
                handle = open_below(self._root, path, flags=os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            except FileExistsError:
                return False
            try:
                os.write(handle, _own_facts(self.token))
            except BaseException:
                (self._root / path).unlink(missing_ok=True)
                raise
            finally:
                os.close(handle)
        return True

    def _overwrite(self, path: str, facts: dict[str, Any]) -> None:
        try:
            handle = open_below(self._root, path, flags=os.O_WRONLY | os.O_TRUNC)
        except FileNotFoundError:  # given back
            return
        try:
            os.write(handle, (json.dumps(facts) + "\n").encode("ascii"))
        finally:
            os.close(handle)

    def _is_left(self, path: str) -> bool:
        """Return whether the owner of a lease is dead: it is known, or was silent for long."""
        try:
            handle = open_below(self._root, path)  # opening asks the server, not a cache
        except FileNotFoundError:  # given back since
            self._seen.pop(path, None)
            return False
        try:
            facts, content = os.fstat(handle), os.pread(handle, _MAX_BYTES, 0)
        finally:
            os.close(handle)
        now, state = time.monotonic(), (facts.st_ino, facts.st_mtime_ns, content)
        owner, is_left = _owner(content), False
        before, since = self._seen.setdefault(path, (state, now))
        if owner.get("ended") is True:
            is_left = True
        elif before != state:
            self._seen[path] = state, now
        else:
            is_left = _is_dead_here(owner) or now - since >= self._times.expiry_s
        if not is_left:
            return False
        logger.debug(f"{path}: left by process {owner.get('pid')} of {owner.get('host')}")
        return True

    def _beat(self) -> None:
        while not self._is_over.wait(self._times.heartbeat_s):
            for path in list(self._held.values()):
                with suppress(OSError):  # expired and removed; or the server does not answer
                    os.utime(self._root / path, follow_symlinks=False)


def is_lease(name: str) -> bool:
    """Return whether a file in the folder of receipts is a lease."""
    return _NAME.fullmatch(name) is not None


def _own_facts(token: str) -> bytes:
    facts = {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "process_started": _start_of(os.getpid()),
        "token": token,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return (json.dumps(facts) + "\n").encode("ascii")


def _owner(content: bytes) -> dict[str, Any]:
    """Return what a lease says of its owner; empty if it cannot be read."""
    try:
        owner = parse_json(content)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead_here(owner: dict[str, Any]) -> bool:
    """Return whether the owner ran on this machine and has ended; false where that is unknown."""
    machine, pid = owner.get("machine"), owner.get("pid")
    if not machine or machine != _machine() or type(pid) is not int or not 0 < pid < 1 << 31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user
        return False
    started = _start_of(pid)
    return started not in ("", owner.get("process_started"))


@cache
def _machine() -> str:
    """Return what tells this machine, since its start, and its process numbers from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """Return when a process started, in ticks; `ended` for one that waits for its parent."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return "ended" if fields[0] in "ZX" else fields[19]
