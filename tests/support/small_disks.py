"""A file system in memory of a chosen size, and a limit on the size of files."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096  # size of a small file on a tmpfs


@contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """Mount a file system of 1 MB; skips the test without the right to."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={1 << 20}", "tmpfs", str(folder)]
    try:
        is_mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        is_mounted = False
    if not is_mounted:
        pytest.skip("a disk of a chosen size needs the right to mount one (root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, num_bytes: int) -> None:
    """Change the size of a disk; not below what is used."""
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", str(disk)], check=True)


def pages_used(disk: Path) -> int:
    """Return the pages in use on a disk."""
    status = os.statvfs(disk)
    return status.f_blocks - status.f_bfree


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Refuse larger files in this process, as `ulimit -f` does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
