"""A program with commands: help, exit codes and one-line errors.

Commands import torch and other large packages when they run, so help and wrong options are fast.
Exit codes: 0 done; 1 a check has failed; 2 wrong input or a full disk, with one line on stderr;
130 interrupted by Ctrl-C. Any other exception is a bug and keeps its traceback.
"""

import difflib
import errno
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from carryon.cache.errors import CarryOnError, InputError
from carryon.cache.files.full_disk import disk_full_number
from carryon.tools.cli.interrupts import interrupts
from carryon.tools.cli.options import options_of
from carryon.tools.cli.output import (
    discard,
    has_reader,
    log_to_stderr,
    open_closed_streams,
    visible,
)
from carryon.tools.cli.parser import parse_call
from carryon.tools.cli.table import format_table

INTERRUPTED = "interrupted. Fix: run the same command to resume"
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Named commands, each a typed function imported on use."""

    prog: str
    """Name as typed."""
    about: str
    """Its purpose, in one or two lines."""
    closing: str
    """Last line of its help."""
    commands: Mapping[str, str]
    """Name -> `module:function`."""
    basic: Mapping[str, str] = field(default_factory=dict)
    """Name -> options that --help shows. Omitted: the parameters of the function."""

    def find(self, name: str) -> Callable[..., Any]:
        """Return the function of the command `name`.

        Raises:
            InputError: there is no such command.
        """
        if name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
            raise InputError(f"command {name!r}: expected {', '.join(self.commands)}; {hint}")
        module, _, attribute = self.commands[name].partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
        return function

    def call(self, name: str, argv: Sequence[str]) -> Any:  # noqa: ANN401 -- each has its own
        """Run the command `name` in this process and return its result."""
        function = self.find(name)
        basic = self.basic.get(name, "").split()
        call, level = parse_call(function, argv, prog=f"{self.prog} {name}", basic=basic)
        with log_to_stderr(level):
            return function(*call.args, **call.kwargs)

    def check(self, name: str, argv: Sequence[str]) -> None:
        """Parse the options of the command `name`, and those in its config, without running it.

        Raises:
            InputError: one is unknown, missing, of the wrong type or out of range.
        """
        basic = self.basic.get(name, "").split()
        parse_call(self.find(name), argv, prog=f"{self.prog} {name}", basic=basic)

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run with `argv` (default: the command line) and return the exit code."""
        words = list(sys.argv[1:] if argv is None else argv)
        prog = f"{self.prog} {words[0]}" if words and words[0] in self.commands else self.prog
        open_closed_streams()
        text = f"{prog}: {INTERRUPTED}"
        with interrupts(text, inside=sys._getframe(), own="carryon.tools") as seen:
            try:
                return self._code(words, prog)
            except Exception:
                if not seen:  # libraries make other errors of one
                    raise
                return _fail(text, code=130)
            finally:
                _flush()

    def _code(self, words: Sequence[str], prog: str) -> int:
        try:
            code = self._run(words)
            sys.stdout.flush()
            return code
        except CarryOnError as error:
            return _fail(f"{prog}: error: {self._as_typed(words[0], str(error))}")
        except KeyboardInterrupt as error:
            return _fail(f"{prog}: {str(error) or INTERRUPTED}", code=130)
        except BrokenPipeError:
            if has_reader(sys.stdout):
                raise
            return 0  # the reader of the output, such as `head`, has seen enough
        except Exception as error:
            place = getattr(error, "filename", None)
            where = f" at {place}" if place else ""
            number = disk_full_number(error)
            if number is not None:
                fix = "Fix: free some space, or raise ulimit -f, and run again"
                return _fail(f"{prog}: error: {os.strerror(number)}{where}. {fix}")
            if isinstance(error, OSError) and error.errno in NOT_ALLOWED:
                return _fail(f"{prog}: error: {error.strerror}{where}")
            raise

    def _as_typed(self, command: str, text: str) -> str:
        """Return the text of an error that begins with the name of a setting with its option."""
        name, colon, rest = text.partition(": ")
        known = options_of(self.find(command)) if command in self.commands else []
        flags = {option.name: option.flag for option in known}
        return f"{flags.get(name, name)}{colon}{rest}"

    def _run(self, words: Sequence[str]) -> int:
        if not words or words[0] in ("-h", "--help"):
            print(self.overview())
            return 0
        if words[0] == "--version":
            from importlib.metadata import version

            print(f"carryon {version('gpt-carry-on')}")
            return 0
        result = self.call(words[0], words[1:])
        return result if isinstance(result, int) else 0

    def overview(self) -> str:
        """Return the text of `--help`."""
        docs = {name: inspect.getdoc(self.find(name)) or "" for name in self.commands}
        rows = [(f"  {name}", text.partition("\n")[0]) for name, text in docs.items()]
        usage = f"usage: {self.prog} COMMAND [options]"
        table = f"commands:\n{format_table(rows)}"
        return "\n\n".join([usage, self.about, table, self.closing])


def _fail(text: str, *, code: int = 2) -> int:
    try:
        print(visible(" ".join(text.split())), file=sys.stderr, flush=True)
    except OSError:  # nobody reads it
        discard(sys.stderr)
    return code


def _flush() -> None:
    """Flush the output; what cannot be written is discarded, so that the exit does not fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            discard(stream)
