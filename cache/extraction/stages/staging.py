"""Host memory that gathers the states of a unit, in the order in which they are computed.

Batches are sorted by length, so their states are not in the order of the unit's rows. Each is
copied behind the one before it, without its pads: from a GPU straight into pinned memory, on a
stream beside the computation. Whoever encodes a chunk gathers its rows by one index.
Letters: B rows of a batch, T positions, R rows of a unit, D base width, n tokens of a batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.device import SideCopy, SideStreams, to_device
from carryon.cache.errors import InputError
from carryon.cache.extraction.packing import Batch
from carryon.cache.store.buffers import BufferPool

_MOST_FREE = 8  # chunks; as many as there are threads that encode


class Staging:
    """Memory for the states of one unit at a time, used again for later ones."""

    def __init__(
        self,
        taps: Sequence[str],
        *,
        num_rows: int,
        width: int,
        keeps_bits: bool,
        streams: SideStreams | None,
    ) -> None:
        """Allocate.

        Args:
            taps: of the store.
            num_rows: R.
            width: D.
            keeps_bits: keep bits of bfloat16, else float32.
            streams: for copies from GPUs. None: the states are computed on the CPU.
        """
        self._keeps_bits, self._streams = keeps_bits, streams
        dtype = torch.uint16 if keeps_bits else torch.float32
        is_pinned = streams is not None
        self._states = {
            tap: torch.empty(num_rows, width, dtype=dtype, pin_memory=is_pinned) for tap in taps
        }
        self._arrays: dict[str, NDArray[Any]] = {
            tap: states.numpy() for tap, states in self._states.items()
        }
        self._order = np.full(num_rows, -1, dtype=np.int64)
        """[R] for each row of the unit, the place of its states; -1: there are none yet."""
        self._count = 0
        self._copies: list[SideCopy] = []
        self._pool = BufferPool(max_free=_MOST_FREE)

    def clear(self) -> None:
        """Begin with another unit."""
        self._count, self._copies = 0, []
        self._order.fill(-1)

    def add(self, batch: Batch, found: Mapping[str, Tensor]) -> SideCopy | None:
        """Copy the states of a batch behind those that are there.

        Args:
            batch: of this unit.
            found: [B, T, D] for each tap.

        Returns:
            Copies that are under way. None: they are whole.

        Raises:
            InputError: the base has not returned a state for each token.
        """
        for tap, states in found.items():
            if states.shape[:-1].numel() != batch.ids.size:
                raise InputError(
                    f"tap {tap}: expected a state for each token of {batch.ids.shape}, got "
                    f"{tuple(states.shape)}. Fix: leave out {tap}"
                )
        first, stop = self._count, self._count + len(batch.rows)
        self._order[batch.rows] = np.arange(first, stop)
        self._count = stop
        if self._streams is None:
            for tap, states in found.items():
                values = self._stored(states).cpu().numpy()
                flat = values.reshape(-1, values.shape[-1])
                # Places are in range, as the shape was compared; "raise" would copy by a buffer.
                np.take(flat, batch.places, axis=0, out=self._arrays[tap][first:stop], mode="clip")
            return None
        places: dict[torch.device, Tensor] = {}
        pairs = []
        for tap, states in found.items():
            if states.device not in places:
                places[states.device] = to_device(torch.from_numpy(batch.places), states.device)
            with torch.inference_mode():
                flat_states = states.reshape(-1, states.shape[-1])
                rows = self._stored(flat_states.index_select(0, places[states.device]))
            pairs.append((self._states[tap][first:stop], rows))
        copy = SideCopy(pairs, self._streams)
        self._copies.append(copy)
        return copy

    def newest(self, count: int) -> dict[str, NDArray[Any]]:
        """Return the states [count, D] that came last, by tap; their copies are whole."""
        return {tap: each[self._count - count : self._count] for tap, each in self._arrays.items()}

    def rows(self, num_tokens: int) -> dict[str, "StagedRows"]:
        """Return the states of the unit by tap, once their copies are whole.

        Args:
            num_tokens: of the unit.

        Raises:
            RuntimeError: a token has no states, or has them twice.
        """
        order = self._order[:num_tokens]
        if self._count != num_tokens or (order < 0).any():
            raise RuntimeError(f"expected states of {num_tokens} tokens, got {self._count}")
        for copy in self._copies:
            copy.wait()
        return {tap: StagedRows(states, order, self._pool) for tap, states in self._arrays.items()}

    def _stored(self, states: Tensor) -> Tensor:
        return states.bfloat16().view(torch.uint16) if self._keeps_bits else states.float()


class StagedRows:
    """States [R, D] of a unit in the order of its rows, gathered when they are read."""

    def __init__(self, states: NDArray[Any], order: NDArray[np.int64], pool: BufferPool) -> None:
        """Wrap the memory of one tap.

        Args:
            states: [R, D] in any order.
            order: [n] place of each of the first n rows; the others are 0.
            pool: memory for rows that are read.
        """
        self._states, self._order, self._pool = states, order, pool
        self.shape: tuple[int, ...] = states.shape
        self.dtype: np.dtype[Any] = states.dtype

    def __getitem__(self, rows: slice, /) -> NDArray[Any]:
        first, stop, _ = rows.indices(self.shape[0])
        places = self._order[first:stop]
        shape = (max(0, stop - first), self.shape[1])
        memory = self._pool.take(shape[0] * shape[1] * self.dtype.itemsize)
        out = memory.view(self.dtype).reshape(shape)
        # Places are in range: `Staging.rows` has looked for -1, and counts the rest itself.
        np.take(self._states, places, axis=0, out=out[: len(places)], mode="clip")
        out[len(places) :] = 0
        return out
