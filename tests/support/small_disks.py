"""A file system in memory of a chosen size, and a limit on the size of files."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from carryon.cache.errors import InputError
from carryon.tools.bench.trust.full_disks import PAGE, pages_used, resize, small_disk

__all__ = ["PAGE", "file_size_limit", "mounted", "pages_used", "resize"]


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """Mount a file system of 1 MB; skips the test without the right to."""
    try:
        disk = small_disk(folder)
        disk.__enter__()
    except InputError as error:
        pytest.skip(str(error))
    try:
        resize(folder, 1 << 20)
        yield folder
    finally:
        disk.__exit__(None, None, None)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Refuse larger files in this process, as `ulimit -f` does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
