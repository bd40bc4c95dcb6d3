"""Write files and folders atomically: each is whole under its name, or not there.

Content is written beside the final name, flushed to the disk, and renamed. A kill leaves at most
a hidden `.partial` file or folder, or a `.replaced` folder that `recover_folder` puts back.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from carryon.cache.files.full_disk import disk_full_named
from carryon.cache.files.locked import held
from carryon.cache.files.regular import refuse_links, unsafe

PARTIAL = ".partial"
REPLACED = ".replaced"
_SYNC_THREADS = 16
_PROCESS = secrets.token_hex(4)
"""Tells this process from one with the same number on another node of a shared file system."""


Part = bytes | bytearray | memoryview
Content = Part | list[Part]
"""Content of a file; a list: its parts."""


def write_file(
    path: Path,
    content: Content,
    *,
    is_synced: bool = True,
    root: Path | None = None,
) -> None:
    """Write `content` to `path`, replacing what was there; folders are made.

    A link at `path` is replaced, not followed. With `is_synced=False` the caller flushes the file
    later: `sync_below`, or `whole_folder`.

    Args:
        path: of the file.
        content: of the file.
        is_synced: flush file and folder to the disk.
        root: folder above it below which no folder may be a link.

    Raises:
        DiskFullError: no space left; nothing of this file remains.
        UnsafePathError: there is a folder at `path`, or a link among the folders below `root`.
    """
    with (
        whole_file(path, is_synced=is_synced, root=root) as partial,
        partial.open("wb") as file,
    ):
        file.writelines(content if isinstance(content, list) else [content])


@contextmanager
def whole_file(path: Path, *, is_synced: bool = True, root: Path | None = None) -> Iterator[Path]:
    """Yield where to write a file; at the end of the block it becomes `path`.

    Arguments and errors are those of `write_file`.
    """
    if root is not None:
        refuse_links(root, path.parent)
    if path.is_dir() and not path.is_symlink():
        raise unsafe(path, "a file")
    partial = path.with_name(f".{path.name}.{os.getpid()}-{_PROCESS}{PARTIAL}")
    with disk_full_named(path):
        _make_folder(path.parent, is_synced=is_synced)
        remove_anything(partial)  # of a killed process with this number; or a planted link
        try:
            yield partial
            if is_synced:
                _sync(partial)
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if is_synced:
            _sync(path.parent)  # without this a power cut may forget the rename


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end of the block it becomes `path`.

    A folder at `path` is replaced: set aside, then removed when the new one has its name. Files in
    the new one need no flushing: all are flushed here. If the block raises, `path` is unchanged.

    Raises:
        DiskFullError: no space left; nothing of the new folder remains.
        StoreBusyError: another process is writing a folder of this name; nothing was changed.
    """
    with disk_full_named(path):
        _make_folder(path.parent, is_synced=True)
    with one_writer(path):
        yield from _fill(path)


@contextmanager
def one_writer(path: Path) -> Iterator[None]:
    """Hold what `whole_folder` holds of the folder `path`; the lock of a killed process goes.

    Raises:
        StoreBusyError: another process is writing it.
    """
    with held(path.with_name(f".{path.name}.lock{PARTIAL}"), of=path, kind="folder"):
        yield


def _fill(path: Path) -> Iterator[Path]:
    recover_folder(path)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    remove_anything(partial)
    with disk_full_named(path):
        partial.mkdir()
        try:
            yield partial
            sync_below(partial, partial.rglob("*"))
            _replace(path, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync(path.parent)
    shutil.rmtree(_aside(path), ignore_errors=True)


def _replace(path: Path, partial: Path) -> None:
    while True:
        if path.exists():
            if _aside(path).is_symlink():
                remove_anything(_aside(path))
            path.rename(_aside(path))
        try:
            partial.rename(path)
            return
        except OSError as error:  # a reader's recover_folder came between the two renames
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def recover_folder(path: Path) -> None:
    """Undo what a kill inside `whole_folder` left half done: afterwards `path` is old or new.

    Call it before looking for a folder that `whole_folder` writes. It costs one look at the disk.
    """
    aside = _aside(path)
    if aside.is_symlink() or not aside.is_dir():
        return
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        return
    with suppress(FileNotFoundError):  # another process was faster
        aside.rename(path)


def recover_folders(parent: Path) -> None:
    """Call `recover_folder` for every folder in `parent` that was set aside."""
    for aside in parent.glob(f".*{REPLACED}"):
        recover_folder(parent / aside.name.removeprefix(".").removesuffix(REPLACED))


def remove_anything(path: Path) -> None:
    """Remove a file, a link (not what it points to) or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink(missing_ok=True)


def remove_file(path: Path) -> None:
    """Remove a file or a link, if there is one.

    Raises:
        UnsafePathError: it is a folder.
    """
    try:
        path.unlink(missing_ok=True)
    except (IsADirectoryError, PermissionError) as error:
        if path.is_dir():
            raise unsafe(path, "a file") from error
        raise


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}{REPLACED}")


def sync_below(root: Path, paths: Iterable[Path]) -> None:
    """Flush files and folders below `root` to the disk, and the folders from `root` to them."""
    files, folders = [], {root.parent}
    for path in paths:
        if path.is_file():
            files.append(path)
        folder = path if path.is_dir() else path.parent
        while folder not in folders:
            folders.add(folder)
            folder = folder.parent
    # One at a time, each would wait for a commit of the file system's journal: 3 ms on ext4.
    with ThreadPoolExecutor(max_workers=_SYNC_THREADS) as pool:
        list(pool.map(_sync, files))
        list(pool.map(_sync, folders - {root.parent}))


def remove_folder(path: Path) -> None:
    """Remove a folder: under its name it is whole, or not there; a kill leaves a `.partial` one."""
    leaving = path.with_name(f".{path.name}.removed{PARTIAL}")
    remove_anything(leaving)
    path.rename(leaving)
    shutil.rmtree(leaving)


def sweep_partials(root: Path) -> int:
    """Remove the `.partial` files of killed writers below `root`; returns their number."""
    leftovers = [path for path in root.rglob(f".*{PARTIAL}") if path.is_file()]
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def _make_folder(folder: Path, *, is_synced: bool) -> None:
    """Make `folder` and its parents; if synced, a power cut does not forget them."""
    if folder.is_dir():
        return
    _make_folder(folder.parent, is_synced=is_synced)
    folder.mkdir(exist_ok=True)
    if is_synced:
        _sync(folder.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
