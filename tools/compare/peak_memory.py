"""Anonymous memory of this process, and its peak while something runs."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_EVERY_S = 0.005


@dataclass(kw_only=True, slots=True)
class Peak:
    """The largest value so far."""

    bytes: int


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process, resident or swapped out. Linux only."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "VmSwap"))


@contextmanager
def watched_peak() -> Iterator[Peak]:
    """Sample the anonymous memory every few milliseconds while the block runs."""
    peak = Peak(bytes=anonymous_bytes())
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(_EVERY_S):
            peak.bytes = max(peak.bytes, anonymous_bytes())

    thread = threading.Thread(target=watch, name="carryon-peak", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()
        peak.bytes = max(peak.bytes, anonymous_bytes())
