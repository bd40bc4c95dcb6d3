"""Files that a server told: only those that are new since their request are ours to remove.

A server is a stranger, and its folder may hold files of others.
"""

import logging
import threading
from pathlib import Path

from carryon.cache.errors import EngineError
from carryon.cache.exchange.engine.requests import remove_states
from carryon.cache.exchange.state_file import LOCK_SUFFIX
from carryon.cache.files.regular import names_below

logger = logging.getLogger(__name__)


class ToldFiles:
    """Files of a folder that a server told for requests; for many threads."""

    def __init__(self, folder: Path) -> None:
        """Prepare; nothing is read."""
        self._folder, self._guard = folder, threading.Lock()
        self._looks = 0
        self._first_look: dict[str, int] = {}
        """Of each name in the folder: number of the look that saw it first."""
        self._kept: set[str] = set()
        """Names that were told and not removed; some files may appear late."""

    def look(self) -> int:
        """Note what the folder holds before a request; return the number of this look."""
        with self._guard:
            self._looks += 1
            known, number = self._first_look, self._looks
            names = names_below(self._folder, "")
            self._first_look = {name: known.get(name, number) for name in names}
            return number

    def take(self, name: str, *, look: int) -> None:
        """Take a file, which may not have appeared yet, as that of a request.

        Args:
            name: of the file.
            look: number of the look before the request.

        Raises:
            EngineError: the file or its lock was there at that look, or is another request's.
        """
        with self._guard:
            first_looks = [self._first_look.get(each) for each in (name, name + LOCK_SUFFIX)]
            if name in self._kept or any(each and each <= look for each in first_looks):
                raise EngineError(
                    f"--endpoint: expected the name of a new file of states, got {name}, which was "
                    "there before the request, or is another request's; it is kept. Fix: give the "
                    "server and this command a folder of their own"
                )
            self._kept.add(name)

    def remove(self, name: str) -> None:
        """Remove a file that was taken.

        Raises:
            EngineError: this user may not, or it is no file.
        """
        with self._guard:
            self._kept.discard(name)
        try:
            remove_states(self._folder, name)
        except OSError as error:
            raise EngineError(
                f"{self._folder / name}: expected a file that can be removed once it is read, got "
                f"'{error.strerror}'. Fix: let this user write to the server's folder"
            ) from error

    def remove_all(self) -> None:
        """Remove every file that was taken and not removed; warn of those that cannot be."""
        for name in list(self._kept):
            try:
                self.remove(name)
            except EngineError as error:
                logger.warning(str(error))
