"""The folder in which tables, rows in memory and samples are kept for a second reading."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from carryon.cache.errors import CarryOnError, DiskFullError
from carryon.cache.files.full_disk import what_is_full


def cache_folder() -> Path:
    """Return where samples are kept: CARRYON_CACHE, or `carryon` in the home of the hub's cache."""
    if given := os.environ.get("CARRYON_CACHE"):
        return Path(given)
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "carryon"


@contextmanager
def writing_cache(folder: Path) -> Iterator[None]:
    """Make a folder of the cache; report what the disk refuses while it is written.

    Raises:
        DiskFullError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except CarryOnError:
        raise  # some are OSErrors too, such as one of a file of the data
    except OSError as error:
        reason = what_is_full(error) or error.strerror or error
        raise DiskFullError(
            f"{folder}: the cache of samples cannot be written: {reason}. Fix: make room, or set "
            "CARRYON_CACHE to another folder"
        ) from error
