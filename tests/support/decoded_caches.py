"""Stores that are read through a folder of decoded states, and a process that dies meanwhile."""

import os
import signal
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.reading.cache_folder import cache_folder
from carryon.cache.files.private_key import read_or_make_key
from carryon.cache.store import decoded_cache
from carryon.cache.store.decoded_cache import KEY, DecodedCache
from carryon.cache.store.reader import Store
from carryon.cache.store.shard_reader import CopyRange


def cache_at(root: Path, *, max_bytes: int = 1 << 30) -> DecodedCache:
    """Return a cache of its own, as of another process."""
    root.mkdir(exist_ok=True)
    return DecodedCache(root, max_bytes=max_bytes, key=read_or_make_key(cache_folder() / KEY))


def open_store(folder: Path, cache: DecodedCache | None) -> Store:
    return Store.open(folder, decoded=cache)


def states_of(store: Store) -> list[NDArray[Any]]:
    """Return the states of every sample at every tap, as a stream reads them, unit by unit."""
    read = []
    for unit in range(store.num_units):
        for tap in store.taps:
            moves = []
            for sample in store.unit_samples(unit):
                first = int(store.sample_starts[sample]) - unit * store.unit_tokens
                length = int(store.sample_lengths[sample])
                to = np.full((length, store.width), 7, dtype=store.states_dtype)
                moves.append(CopyRange(first=first, stop=first + length, to=to))
            store.copy_states(unit, tap, moves)
            read += [move.to for move in moves]
    return read


def files_of(root: Path) -> list[Path]:
    return sorted(root.glob("*.states"))


def read_often(folder: Path, root: Path, own: Path, times: int) -> None:
    """Read a store several times; raises if it gives other states than without the folder."""
    os.environ["CARRYON_CACHE"] = str(own)
    expected, store = states_of(open_store(folder, None)), open_store(folder, cache_at(root))
    for _ in range(times):
        for ours, plain in zip(states_of(store), expected, strict=True):
            np.testing.assert_array_equal(ours, plain)


def read_and_die(folder: Path, root: Path, own: Path, after: int) -> None:
    """Read a store, and die by kill -9 after some writes, each of half of what is left.

    `own` is the folder with the user's key.
    """
    os.environ["CARRYON_CACHE"] = str(own)
    calls = count()

    def write_all(handle: int, content: memoryview) -> None:
        while content:
            content = content[os.write(handle, content[: max(1, len(content) // 2)]) :]
            if next(calls) == after:
                os.kill(os.getpid(), signal.SIGKILL)

    decoded_cache._write_all = write_all
    states_of(open_store(folder, cache_at(root)))
