"""What a program writes: messages to stderr, results as JSON lines to stdout."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from carryon.cache.progress import is_main_process

LEVELS = ("debug", "info", "warning", "error")
T = TypeVar("T")
logger = logging.getLogger(__name__)


def print_result(result: T, summary: str = "") -> T:
    """Log a summary, print the result as one JSON line, and return the result.

    Of several processes only the main one prints.
    """
    if summary:
        logger.info(summary)
    if is_main_process():
        print(json.dumps(result), flush=True)
    return result


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno == logging.WARNING:
            text = f"warning: {text}"
        bars = sys.modules.get("tqdm")
        if bars is not None:  # a bar on the screen moves down
            bars.tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)
        sys.stderr.flush()


@contextmanager
def log_to_stderr(level: str) -> Iterator[None]:
    """Show log messages of at least `level`; within another such context, do nothing.

    Progress bars of other libraries are shown only where ours are.
    """
    root = logging.getLogger("carryon")
    if any(isinstance(handler, _Handler) for handler in root.handlers):
        yield
        return
    is_main, handler, level_before = is_main_process(), _Handler(), root.level
    bars_before = os.environ.get("TQDM_DISABLE")
    if not (is_main and sys.stderr.isatty() and level in LEVELS[:2]):
        os.environ["TQDM_DISABLE"] = "1"
    root.addHandler(handler)
    root.setLevel(level.upper() if is_main else logging.ERROR)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level_before)
        if bars_before is None:
            os.environ.pop("TQDM_DISABLE", None)
