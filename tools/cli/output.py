"""What a program writes: messages to stderr, results as JSON lines to stdout.

Text from files may be hostile to a terminal: its control characters are shown by their codes.
"""

import json
import logging
import os
import select
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO, TypeVar

from carryon.cache.progress import is_main_process

_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of characters that do not show, or change how others do."""
LEVELS = ("debug", "info", "warning", "error")
T = TypeVar("T")
logger = logging.getLogger(__name__)


def visible(text: str) -> str:
    """Return a text with characters that do not show, but line ends and tabs, as codes."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _HIDDEN and char not in "\n\t"
        else char
        for char in text
    )


def print_result(result: T, summary: str = "") -> T:
    """Log a summary, print the result as one JSON line, and return the result.

    Of several processes only the main one prints.
    """
    if summary:
        logger.info(summary)
    if is_main_process():
        try:
            print(json.dumps(result), flush=True)
        except BrokenPipeError:  # the reader, such as `head`, has ended; the exit code counts still
            discard(sys.stdout)
    return result


def open_closed_streams() -> None:
    """Open the standard streams that the caller has closed, so that what they get is discarded.

    Else the next file to be opened would get the number of one, and libraries would write into it.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115 -- it stays
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def discard(stream: TextIO) -> None:
    """Let a stream that cannot be written discard what it has and gets."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, stream.fileno())
    os.close(sink)


def has_reader(stream: TextIO) -> bool:
    """Return whether a stream is no pipe, or one whose reader has not ended."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._show(record)
        except OSError:  # nobody reads the messages; the work goes on
            discard(sys.stderr)

    def _show(self, record: logging.LogRecord) -> None:
        text = visible(self.format(record))
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
