"""What a process of `processes` finds imported; here as such a process imports no test's file."""

import sys
from multiprocessing.connection import Connection

from carryon.tools.bench.processes import PRELOADED


def tell_missing(talk: Connection) -> None:
    """Send the names of modules that are to be imported and are not."""
    talk.send([name for name in PRELOADED if name not in sys.modules])
