"""One way of another project to keep hidden states, and to make batches of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.tools.bench.disk import Charge
from carryon.tools.bench.states import StateSet

BATCH_SAMPLES = 4
"""Samples of a padded batch."""

LoadBatch = Callable[[NDArray[np.int64]], dict[str, Any]]
"""Reads some samples and returns them as one batch, ready for a device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One way to keep hidden states."""

    name: str
    read_as: str
    """How it is read, in words."""
    write: Callable[[StateSet, Path], None]
    """Writes all samples below a new folder."""
    open: Callable[[StateSet, Path, Charge], LoadBatch]
    """Opens what was written; each read is charged before it is made."""
    batch: Callable[[NDArray[np.int32], np.random.Generator], list[NDArray[np.int64]]]
    """Puts the samples of these lengths into batches, in random order, for one epoch."""
    is_limit: bool = False
    """It bounds what a layout can reach from memory, and no other is held against it."""


def random_batches(
    lengths: NDArray[np.int32], random: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Return batches of BATCH_SAMPLES samples, the order of all of them random."""
    order = random.permutation(len(lengths))
    return [order[first : first + BATCH_SAMPLES] for first in range(0, len(order), BATCH_SAMPLES)]


def as_bfloat16(bits: NDArray[np.uint16]) -> Tensor:
    """Return raw bits as a bfloat16 tensor on the same memory."""
    return torch.from_numpy(bits).view(torch.bfloat16)
