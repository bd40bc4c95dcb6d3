"""A random key in a file that only its owner may read: it tells own files from others'."""

import logging
import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from carryon.cache.errors import UnsafePathError
from carryon.cache.files.atomic import PARTIAL
from carryon.cache.files.regular import open_below

logger = logging.getLogger(__name__)

KEY_BYTES = 32


def read_or_make_key(path: Path) -> bytes:
    """Return the key in a file, which is made if it is missing, with its folder.

    What is there but is no key that only its owner may read is replaced. If the file cannot be
    written, the key is one for this process, with a warning.
    """
    key = secrets.token_bytes(KEY_BYTES)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL}")
    try:
        if (found := _read(path)) is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write(partial, key)
            with suppress(FileExistsError):  # another process was faster: its key counts
                os.link(partial, path)
        finally:
            partial.unlink(missing_ok=True)
        if (found := _read(path)) is not None:
            return found
        reason = "something else has its name"
    except OSError as error:
        reason = error.strerror or str(error)
    logger.warning(
        f"{path}: the key cannot be kept: {reason}. What is signed with it serves this process "
        "only. Fix: set CARRYON_CACHE to a folder of your own"
    )
    return key


def _read(path: Path) -> bytes | None:
    """Return the key; None if there is none, after what is no key was removed."""
    try:
        handle = open_below(path.parent, path.name)
    except FileNotFoundError:
        return None
    except UnsafePathError:
        _remove(path)
        return None
    try:
        facts, key = os.fstat(handle), os.read(handle, KEY_BYTES + 1)
    finally:
        os.close(handle)
    is_own = facts.st_uid == os.geteuid() and not stat.S_IMODE(facts.st_mode) & 0o077
    if is_own and len(key) == KEY_BYTES:
        return key
    _remove(path)
    return None


def _remove(path: Path) -> None:
    with suppress(IsADirectoryError, PermissionError):
        path.unlink(missing_ok=True)


def _write(path: Path, key: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.write(handle, key)
        os.fsync(handle)
    finally:
        os.close(handle)
