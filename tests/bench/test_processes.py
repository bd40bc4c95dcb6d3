"""Processes of benchmarks and tests are forked from one that has imported everything."""

import sys
from multiprocessing.connection import Connection

from carryon.tools.bench.processes import PRELOADED, processes


def _tell_missing(talk: Connection) -> None:
    talk.send([name for name in PRELOADED if name not in sys.modules])


def test_all_modules_are_there_before_the_first_line() -> None:
    """One that cannot be imported is left out without a word, and costs each process seconds."""
    ours, theirs = processes().Pipe()
    process = processes().Process(target=_tell_missing, args=(theirs,))
    process.start()
    assert ours.recv() == []
    process.join()
