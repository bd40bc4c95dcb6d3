"""The `carryon` command: help, exit codes, and errors in one line.

torch and other large packages are imported by the subcommands' functions when they run, so
help and mistakes in the command line are answered at once. Exit codes: 0 done, 1 a check that
did not hold, 2 a mistake or a full disk (one line on stderr), 130 stopped with Ctrl-C. Anything
else is a bug and keeps its traceback.
"""

import errno
import inspect
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from carryon.cache.errors import CarryOnError
from carryon.tools.subcommands import SUBCOMMANDS, call_subcommand, find_subcommand, join_name

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `carryon` with `argv` (default: the command line) and return its exit code."""
    words = join_name(sys.argv[1:] if argv is None else argv)
    prog = f"carryon {words[0]}" if words and words[0] in SUBCOMMANDS else "carryon"
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except CarryOnError as error:
        return _fail(f"{prog}: error: {error}")
    except KeyboardInterrupt as error:
        text = str(error) or "stopped; run the same command to go on"
        return _fail(f"{prog}: {text}", code=130)
    except BrokenPipeError:  # the reader of our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f" at {error.filename}" if error.filename else ""
        if error.errno in DISK_FULL:
            return _fail(f"{prog}: error: the disk is full{where}: free some space and run again")
        if error.errno in NOT_ALLOWED:
            return _fail(f"{prog}: error: {error.strerror}{where}")
        raise


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"carryon {version('gpt-carry-on')}")
        return 0
    result = call_subcommand(words[0], words[1:])
    return result if isinstance(result, int) else 0


def overview() -> str:
    """Return the text of `carryon --help`."""
    summaries = {
        name: (inspect.getdoc(find_subcommand(name)) or "").partition("\n")[0]
        for name in SUBCOMMANDS
    }
    return "\n".join(
        [
            "usage: carryon SUBCOMMAND [options]",
            "",
            "Customize an LLM without training it: extract its hidden states from your text once,",
            "train small carry-on modules from that store, and run them on top of the frozen base.",
            "",
            "subcommands:",
            *(f"  {name:<11} {summary}" for name, summary in summaries.items()),
            "",
            "carryon SUBCOMMAND --help explains its options. New here? Run carryon demo.",
        ]
    )


def _fail(text: str, *, code: int = 2) -> int:
    print(" ".join(text.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
