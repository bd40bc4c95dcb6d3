"""The peak of anonymous memory, without pages that a file backs."""

import mmap
import time
from pathlib import Path

import numpy as np

from carryon.tools.compare.peak_memory import anonymous_bytes, watched_peak

_BYTES = 64 << 20
_SLACK = 8 << 20


def _take() -> mmap.mmap:
    """Return memory that is new to the process; an allocator may reuse freed memory."""
    memory = mmap.mmap(-1, _BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, _BYTES, mmap.PAGESIZE):
        memory[page] = 1
    return memory


def test_memory_in_use_is_counted_until_it_is_freed() -> None:
    before = anonymous_bytes()
    held = _take()
    during = anonymous_bytes()
    held.close()

    assert abs(during - before - _BYTES) < _SLACK
    assert abs(anonymous_bytes() - before) < _SLACK


def test_the_peak_includes_memory_freed_within_the_block() -> None:
    before = anonymous_bytes()
    with watched_peak() as peak:
        held = _take()
        time.sleep(0.05)  # ten looks
        held.close()

    assert abs(peak.bytes - before - _BYTES) < _SLACK


def test_memory_in_use_at_the_end_is_seen_even_after_a_short_block() -> None:
    before = anonymous_bytes()
    with watched_peak() as peak:
        held = _take()

    assert peak.bytes - before > len(held) - _SLACK


def test_pages_of_a_mapped_file_are_not_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\1" * _BYTES)
    before = anonymous_bytes()
    with watched_peak() as peak:
        mapped = np.memmap(tmp_path / "file", dtype=np.uint8, mode="r")
        assert int(mapped.sum(dtype=np.int64)) == _BYTES

    assert peak.bytes - before < _SLACK
