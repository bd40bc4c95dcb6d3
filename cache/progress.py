"""Progress of long loops: a bar on a terminal, else plain log lines.

Nothing is shown unless this logger is enabled for INFO, and only by the first process of a
`torchrun`. A log gets a line when 10 s or 10 % have passed, at most one a second.
"""

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, Self, TypeVar

LINE_S, LINE_RATIO, MIN_LINE_S = 10.0, 0.1, 1.0
_LINE = "{desc}: {percentage:.0f}% ({n_fmt} of {total_fmt}), {rate_noinv_fmt}, {remaining} left"
T = TypeVar("T")
logger = logging.getLogger(__name__)


def is_main_process() -> bool:
    """Return whether this is the first process of a `torchrun`, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class Progress:
    """Shows how much of a loop is done, as a context manager.

    Args:
        total: work to do, in `unit`.
        name: of the loop, a verb.
        unit: of the work; `B` and `tokens` are shown in thousands, millions, ...
    """

    def __init__(self, total: float, *, name: str, unit: str) -> None:
        self.note = ""
        """Shown after the counts, such as the newest loss."""
        self._name, self._total = name, total
        self._count: float = 0
        self._line_count: float = 0
        self._style = {"unit": unit, "unit_scale": unit in ("B", "tokens")}
        self._bar: Any = None
        self._is_on = logger.isEnabledFor(logging.INFO) and is_main_process() and total > 0
        self._started_at = self._line_at = time.monotonic()
        if self._is_on and sys.stderr.isatty():
            from tqdm import tqdm

            # leave=None: a bar within another bar disappears at its end
            self._bar = tqdm(total=total, desc=name, leave=None, **self._style)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._line_count < self._count:
            self._log_line(min_ratio=0.0)

    def update(self, count: float = 1) -> None:
        """Add work that is done."""
        self._count += count
        if self._bar is not None:
            self._bar.set_postfix_str(self.note, refresh=False)
            self._bar.update(count)
        else:
            self._log_line(min_ratio=LINE_RATIO)

    def _log_line(self, *, min_ratio: float) -> None:
        now = time.monotonic()
        waited_s, done = now - self._line_at, self._count - self._line_count
        is_due = waited_s >= LINE_S or (waited_s >= MIN_LINE_S and done >= min_ratio * self._total)
        if not (self._is_on and is_due):
            return
        from tqdm import tqdm

        self._line_at, self._line_count = now, self._count
        style = {**self._style, "prefix": self._name, "bar_format": _LINE}
        style["unit"] = f" {style['unit']}"
        meter = tqdm.format_meter(self._count, self._total, now - self._started_at, **style)
        line = " ".join(meter.split())
        logger.info(f"{line}, {self.note}" if self.note else line)


def track(items: Iterable[T], *, total: float, name: str, unit: str) -> Iterator[T]:
    """Yield the items and show how many of `total` are done."""
    with Progress(total, name=name, unit=unit) as progress:
        for item in items:
            yield item
            progress.update()


def show_seconds(seconds: float) -> str:
    """Return a duration for a reader, such as `42 s`, `3.5 min` or `2.1 h`."""
    if seconds < 120:
        return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
