"""Memory that is used again once nobody holds what was in it.

Large arrays come from the system as pages that it must clear first: a seventh of the time that
reading a unit takes. Here a block goes back on a list when the last view of it is gone, and the
next array of that size takes it from there. More blocks than were in use at one time never exist.
"""

import weakref

import numpy as np
from numpy.typing import NDArray

_MOST_FREE = 32
"""Blocks kept for later, such as those of a few units with a few taps; more of them go back to the
system."""


class Recycler:
    """A list of free blocks, safe to use from several threads."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._free: list[_Block] = []

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return an array [num_bytes] with anything in it.

        Its memory is free again when the array is gone, and every view of it: slices, reshaped or
        retyped arrays, tensors made of them.
        """
        block = self._take_free(num_bytes) or _Block(num_bytes)
        # Not a view that numpy knows of: views of it then keep it alive, and not the block.
        array = np.frombuffer(block.memory.data[:num_bytes], dtype=np.uint8)
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    def _take_free(self, num_bytes: int) -> "_Block | None":
        fitting = [block for block in self._free if block.fits(num_bytes)]
        for block in sorted(fitting, key=lambda block: block.memory.nbytes):
            try:
                self._free.remove(block)
            except ValueError:  # another thread was faster
                continue
            return block
        return None

    def _give_back(self, block: "_Block") -> None:
        # Called whenever an array dies, perhaps inside any of the lines above: no lock.
        self._free.append(block)
        del self._free[:-_MOST_FREE]


class _Block:
    """Some memory; equal to itself only."""

    def __init__(self, num_bytes: int) -> None:
        # Compressed files differ in size by a little: room for a larger one.
        self.memory = np.empty(num_bytes + num_bytes // 16, dtype=np.uint8)

    def fits(self, num_bytes: int) -> bool:
        """Whether it is large enough, and not much too large."""
        return num_bytes <= self.memory.nbytes <= num_bytes + num_bytes // 4
