"""A pool of large buffers that are reused once nobody holds them.

New memory comes from the system as pages that it must clear first, which takes longer than
decoding a unit into them. A block returns to the pool when the last view of it is gone, and the
next array of that size takes it. There are never more blocks than were in use at one time.
"""

import weakref

import numpy as np
from numpy.typing import NDArray


class BufferPool:
    """Lists of free blocks, safe to use from several threads."""

    def __init__(self, *, max_free: int) -> None:
        """Begin without blocks.

        Args:
            max_free: free blocks of one size that are kept; more go back to the system.
        """
        self.made_bytes = 0
        """Bytes of all blocks that were allocated."""
        self._most_free = max_free
        self._free: dict[int, list[NDArray[np.uint8]]] = {}

    def keep(self, max_free: int) -> None:
        """Keep at least `max_free` free blocks of one size."""
        self._most_free = max(self._most_free, max_free)

    def close(self) -> None:
        """Give free blocks back to the system, and those in use when they are free."""
        self._most_free = 0
        self._free.clear()

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return an uninitialized array [num_bytes].

        Its memory is free again when the array and every view of it are gone: slices, reshaped or
        retyped arrays, tensors made of them.
        """
        try:
            block = self._free[num_bytes].pop()
        except (KeyError, IndexError):
            block = np.empty(num_bytes, dtype=np.uint8)
            self.made_bytes += num_bytes
        # Not a view that numpy knows of: views of it then keep it alive, and not the block.
        array = np.frombuffer(block.data, dtype=np.uint8)
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    def _give_back(self, block: NDArray[np.uint8]) -> None:
        # Called whenever an array dies, perhaps inside any of the lines above: no lock.
        free = self._free.setdefault(block.nbytes, [])
        if len(free) < self._most_free:
            free.append(block)
