"""Keep decoded states of units in a folder: the first reading writes them, later ones map them.

A file holds the rows of one unit at one tap as they are read, and behind them their HMAC-SHA256
with the user's own key. Its name is an HMAC of the digests of the unit's files. So a file that is
damaged, cut off, of other states or made by a stranger is not used: the unit is decoded again.
A file is compared when it is first read, and again once it has changed.

Files are written aside, flushed and renamed, by one process at a time; others only read. No file
is removed to make room. Epochs read all units in turn: of a store that is larger than the limit,
the oldest file would always leave just before it is read again. What goes wrong in the folder after
it was opened ends in one warning and never stops a run. Letters: R rows of a unit that belong to
samples, D base width.
"""

import hmac
import mmap
import os
import re
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.reading.cache_folder import cache_folder
from carryon.cache.errors import InputError, StoreBusyError, StoreError
from carryon.cache.files.atomic import PARTIAL, whole_file
from carryon.cache.files.documents import json_bytes
from carryon.cache.files.full_disk import what_is_full
from carryon.cache.files.locked import held
from carryon.cache.files.private_key import read_or_make_key
from carryon.cache.files.regular import open_below
from carryon.cache.format.codec import bytes_of
from carryon.cache.format.receipt import Receipt
from carryon.cache.store.shard_reader import CopyRange, UnitFiles, change_stamp

logger = getLogger(__name__)

LOCK = ".lock"
KEY = "decoded-states.key"
"""In the folder of cached samples, not in that of the states, which may be a stranger's."""
_HMAC = "sha256"
_HMAC_BYTES = 32
_FILE = re.compile(r"[0-9a-f]{64}\.states")
_PARTIAL = re.compile(rf"\.[0-9a-f]{{64}}\.states\.[0-9a-f-]+{re.escape(PARTIAL)}")
_ROOM_LEFT = (0.02, 1_000_000_000)
"""Part of the disk, and at most how many bytes, that are left to checkpoints and other files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """The file of a unit's states at a tap."""

    name: str
    shape: tuple[int, int]
    """[R, D]"""
    dtype: np.dtype[Any]

    @property
    def states_bytes(self) -> int:
        """Bytes of the rows."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def file_bytes(self) -> int:
        """Bytes of rows and HMAC."""
        return self.states_bytes + _HMAC_BYTES


@dataclass(slots=True)
class _Counts:
    """What was read and written since the folder was opened; one unit at one tap counts as one."""

    hits: int = 0
    """Reads from the folder."""
    hit_bytes: int = 0
    """Bytes of rows copied from it."""
    misses: int = 0
    """Reads that decoded the store."""
    written: int = 0
    """Files written."""
    written_bytes: int = 0
    refused: int = 0
    """Files that were not used, as they were not as they had been written."""


class DecodedCache:
    """A folder of decoded states; make one with `open_cache`. Threads may share it."""

    def __init__(self, root: Path, *, max_bytes: int, key: bytes) -> None:
        """Read nothing yet.

        Args:
            root: the folder.
            max_bytes: of all files in it.
            key: of the user: files made with another one are not used.
        """
        self.root, self.max_bytes = root, max_bytes
        self.counts = _Counts()
        self._key = key
        self._lock = threading.Lock()
        self._writer: int | None = None
        """Process that holds the lock file; a fork of it does not."""
        self._used_bytes = 0
        self._is_stopped = False
        self._checked: dict[str, tuple[int, ...]] = {}
        """Name -> stamp of the file that was found to be whole."""
        self._skipped: set[str] = set()
        """Names that are being written, or cannot be."""
        self._said: dict[str, object] = {}

    def copy_states(
        self,
        files: UnitFiles,
        tap: str,
        unit: int,
        moves: Sequence[CopyRange],
        receipt: Receipt,
    ) -> bool:
        """Copy rows of a unit's states at a tap, which are first written here if they are missing.

        Returns:
            Whether they were copied; if not, the arrays hold anything.

        Raises:
            DamagedStoreError: a file of the unit is missing or has another size.
        """
        identity = files.states_identity(tap, unit, receipt)
        entry = _Entry(
            name=f"{self._hmac(json_bytes(identity)).hexdigest()}.states",
            shape=(identity["num_tokens"], identity["width"]),
            dtype=np.dtype(identity["dtype"]),
        )
        if not moves or max(move.stop for move in moves) > entry.shape[0]:
            return False  # rows that belong to no sample are not kept
        if self._copy(entry, moves):
            copied = sum(move.to.nbytes for move in moves)
            with self._lock:
                self.counts.hits += 1
                self.counts.hit_bytes += copied
            return True
        with self._lock:
            self.counts.misses += 1
        return self._add(entry, files.iter_states(tap, unit, receipt)) and self._copy(entry, moves)

    def __str__(self) -> str:
        """Return folder and limit, for people."""
        return f"{self.root}, at most {self.max_bytes / 1e9:.3g} GB"

    def facts(self) -> dict[str, int]:
        """Return what was read and written since the folder was opened."""
        return asdict(self.counts)

    def _copy(self, entry: _Entry, moves: Sequence[CopyRange]) -> bool:
        """Copy rows from the file, if it is there and whole."""
        try:
            handle = open_below(self.root, entry.name)
        except FileNotFoundError:
            return False
        except (StoreError, OSError) as error:
            return self._refuse(entry, str(error))
        try:
            facts = os.fstat(handle)
            if facts.st_size != entry.file_bytes:
                return self._refuse(
                    entry, f"expected {entry.file_bytes:,} bytes, got {facts.st_size:,}"
                )
            # Mapped for each reading: reading into memory takes three times as long, and a mapping
            # that is kept kills the process if somebody cuts the file off.
            mapped = mmap.mmap(handle, entry.file_bytes, prot=mmap.PROT_READ)
        except OSError as error:
            return self._refuse(entry, str(error))
        finally:
            os.close(handle)
        mapped.madvise(mmap.MADV_WILLNEED)
        content = np.frombuffer(mapped, dtype=np.uint8)
        if self._checked.get(entry.name) != change_stamp(facts):
            states = content[: entry.states_bytes].data
            found = self._hmac(entry.name.encode(), states).digest()
            if not hmac.compare_digest(found, content[entry.states_bytes :].tobytes()):
                return self._refuse(entry, "the content differs from its digest")
            self._checked[entry.name] = change_stamp(facts)
        rows = content[: entry.states_bytes].view(entry.dtype).reshape(entry.shape)
        for move in moves:
            move.to[:] = rows[move.first : move.stop]
        return True

    def _add(self, entry: _Entry, pieces: Iterator[NDArray[Any]]) -> bool:
        """Write the rows of a unit as they are decoded, if this process may; tells whether."""
        with self._lock:
            needed = entry.file_bytes - _size_of(self.root / entry.name)
            if not self._may_write(entry, needed):
                return False
            self._used_bytes += needed
            self._skipped.add(entry.name)
        is_written = False
        try:
            self._write(entry, pieces)
            is_written = True
        except StoreError as error:  # the store's own readers decide whether a run can go on
            self._warn("skipped", f"a unit is not kept: {error}")
        except OSError as error:
            self._stop(f"it cannot be written: {what_is_full(error) or error.strerror or error}")
        with self._lock:
            if is_written:
                self._skipped.discard(entry.name)
                self.counts.written += 1
                self.counts.written_bytes += entry.file_bytes
            else:
                self._used_bytes -= needed
        return is_written

    def _write(self, entry: _Entry, pieces: Iterator[NDArray[Any]]) -> None:
        path = self.root / entry.name
        with ExitStack() as stack:
            with whole_file(path) as partial:
                # "x": a link that somebody put there is not followed. Open until it is renamed, so
                # that the stamp is that of this file.
                file = stack.enter_context(partial.open("xb", buffering=0))
                digest = self._hmac(entry.name.encode())
                for rows in pieces:
                    content = bytes_of(rows).data
                    digest.update(content)
                    _write_all(file.fileno(), content)
                _write_all(file.fileno(), memoryview(digest.digest()))
            self._checked[entry.name] = change_stamp(os.fstat(file.fileno()))

    def _may_write(self, entry: _Entry, num_bytes: int) -> bool:
        """Tell whether a file that takes `num_bytes` more may be written; the lock is held."""
        if self._is_stopped or entry.name in self._skipped or not self._is_writer():
            return False
        if self._used_bytes + num_bytes > self.max_bytes:
            self._say(
                "limit",
                f"it holds {self._used_bytes / 1e9:.3g} of at most {self.max_bytes / 1e9:.3g} GB: "
                "other units are decoded in each epoch. Fix: raise --decoded-cache-gb, or delete "
                "the folder if it holds another store",
            )
            return False
        try:
            disk = os.statvfs(self.root)
        except OSError as error:
            self._stop(str(error))
            return False
        ratio, most = _ROOM_LEFT
        left = min(ratio * disk.f_blocks * disk.f_frsize, most)
        # A file system without a size of its own says that it has no blocks.
        if disk.f_blocks and disk.f_bavail * disk.f_frsize - num_bytes < left:
            self._stop("the disk is full")
        return not self._is_stopped

    def _is_writer(self) -> bool:
        """Take the lock file, unless this process has it; another process may."""
        if self._writer == os.getpid():
            return True
        stack = ExitStack()
        try:
            stack.enter_context(held(self.root / LOCK, of=self.root, kind="decoded cache"))
            self._used_bytes = _tidy(self.root)
        except StoreBusyError as error:
            self._say("busy", f"{error}; this run reads from it and adds nothing meanwhile")
            return False
        except (InputError, OSError) as error:
            stack.close()
            self._stop(str(error))
            return False
        weakref.finalize(self, _release, stack, os.getpid())
        self._writer = os.getpid()
        return True

    def _refuse(self, entry: _Entry, reason: str) -> bool:
        with self._lock:
            self.counts.refused += 1
        self._warn(
            "refused",
            f"{entry.name} is not as it was written ({reason}): the unit is decoded again. Further "
            "files like it are only counted",
        )
        return False

    def _stop(self, reason: str) -> None:
        self._is_stopped = True
        self._warn("stopped", f"{reason}: no more units are kept; the run continues without them")

    def _warn(self, kind: str, text: str) -> None:
        if self._is_new(kind):
            logger.warning(f"{self.root}: decoded cache: {text}")

    def _say(self, kind: str, text: str) -> None:
        if self._is_new(kind):
            logger.info(f"{self.root}: decoded cache: {text}")

    def _is_new(self, kind: str) -> bool:
        """Tell, once, that nothing of this kind was said; threads may ask at the same time."""
        own = object()
        return self._said.setdefault(kind, own) is own

    def _hmac(self, *parts: bytes | memoryview) -> "hmac.HMAC":
        made = hmac.new(self._key, digestmod=_HMAC)
        for part in parts:
            made.update(part)
        return made


_OPEN: "weakref.WeakValueDictionary[tuple[int, str], DecodedCache]" = weakref.WeakValueDictionary()
"""Those of this process, by folder: several stores and data sets of a run share one."""


def open_cache(folder: str, *, max_gb: float) -> DecodedCache | None:
    """Return the decoded cache in a folder, which is made; None without a folder or a full disk.

    Args:
        folder: that the user named. Empty: none.
        max_gb: maximum of all files in it, in units of 1e9 bytes.

    Raises:
        InputError: there is a file, or a folder of something else.
    """
    if not folder:
        return None
    root, max_bytes = Path(folder), int(max_gb * 1e9)
    try:
        root.mkdir(parents=True, exist_ok=True)
        names = os.listdir(root)
    except OSError as error:
        if full := what_is_full(error):
            logger.warning(f"{root}: decoded cache: {full}: the run continues without it")
            return None
        problem = "a file" if isinstance(error, FileExistsError) else error.strerror
        raise InputError(
            f"decoded_cache: expected a folder for decoded states, got {folder}: {problem}. Fix: "
            "give another folder"
        ) from error
    if other := sorted(name for name in names if not _is_ours(name)):
        raise InputError(
            f"decoded_cache: expected an empty folder or a decoded cache, got {folder} with "
            f"{other[0]!a:.80}. Fix: give a folder of its own"
        )
    place = os.getpid(), os.path.realpath(root)
    cache = _OPEN.get(place) or DecodedCache(
        root, max_bytes=max_bytes, key=read_or_make_key(cache_folder() / KEY)
    )
    cache.max_bytes = max_bytes
    _OPEN[place] = cache
    return cache


def _is_ours(name: str) -> bool:
    """Tell whether a name may lie in the folder; hidden ones of the system are left alone."""
    return name.startswith(".") or _FILE.fullmatch(name) is not None


def _tidy(root: Path) -> int:
    """Remove what killed writers left, and return the bytes of all files; the lock is held."""
    used = 0
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                continue
            if _PARTIAL.fullmatch(entry.name):
                os.unlink(entry.path)
            else:
                used += entry.stat(follow_symlinks=False).st_size
    return used


def _size_of(path: Path) -> int:
    """Return the bytes of the file at a path, which another takes the place of; 0 without one."""
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0


def _write_all(handle: int, content: memoryview) -> None:
    while content:
        content = content[os.write(handle, content) :]


def _release(stack: ExitStack, process: int) -> None:
    if os.getpid() == process:
        stack.close()
