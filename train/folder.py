"""Folders that are either whole or not there.

A folder is filled beside its final name, flushed to the disk, and renamed. A kill leaves at most a
`.partial` folder, which the next write of the same name removes.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from carryon.cache.atomic import PARTIAL, disk_full_named


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; at the end of the block it becomes `path`.

    What stood at `path` before is replaced. If the block raises, `path` is as it was.

    Raises:
        DiskFullError: no space left; nothing of the new folder remains.
    """
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    with disk_full_named(path):
        partial.mkdir(parents=True)
        try:
            yield partial
            for file in partial.iterdir():
                _flush(file)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
        _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
