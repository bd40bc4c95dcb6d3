"""A batch: samples of one store laid end to end, without pads, with their supervised pairs.

A supervised pair is the state of one token and the id of the next token, where that is a training
target of the same sample. Letters: N tokens of the batch, B samples, D base width, M supervised
pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.device import to_device
from carryon.cache.store.view import StoreLike
from carryon.train.modules.packed_attention import Packing, pack


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Input of a step of training or evaluation."""

    samples: NDArray[np.int64]
    """[B] indices of the samples in their store."""
    lengths: NDArray[np.int64]
    """[B] tokens of each sample."""
    states: dict[str, Tensor]
    """[N, D] for each tap, in the store's dtype."""
    tokens: Tensor
    """[N] int32."""
    positions: Tensor
    """[M] int64: token of each supervised pair's state, ascending."""
    targets: Tensor
    """[M] int64: the token that follows it."""
    origin: "Batch | None" = None
    """The same on the host, without states. None: this is where it was made."""

    @property
    def host(self) -> "Batch":
        """The batch where it was made: reading it does not wait for an accelerator."""
        return self.origin or self

    @property
    def num_tokens(self) -> int:
        """N, tokens."""
        return int(self.lengths.sum())

    @property
    def num_targets(self) -> int:
        """M, supervised pairs."""
        return len(self.targets)

    def rows_of_pairs(self) -> NDArray[np.int64]:
        """Return the row of `samples` that each supervised pair belongs to, [M]."""
        positions = self.host.positions.cpu().numpy()
        return np.searchsorted(np.cumsum(self.lengths), positions, side="right")

    def packing(self) -> Packing:
        """Return where each token belongs, on the batch's device."""
        # Made on the host, where the lengths are: an accelerator would be waited for four times.
        return pack(torch.from_numpy(self.lengths)).to(self.targets.device)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on `device`, copied without a wait; the host keeps all but states."""
        if device.type == "cpu":
            return self
        moved = self._map(partial(to_device, device=device))
        return replace(moved, origin=replace(self.host, states={}))

    def pinned(self) -> "Batch":
        """Return the batch in pinned memory, from which an accelerator copies by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        return replace(
            self,
            states={tap: move(states) for tap, states in self.states.items()},
            tokens=move(self.tokens),
            positions=move(self.positions),
            targets=move(self.targets),
        )


def make_batch(
    samples: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    tokens: NDArray[np.int32],
    loss_mask: NDArray[np.uint8],
    states: Mapping[str, NDArray[Any]],
    is_pinned: bool,
) -> Batch:
    """Return a batch of samples that lie end to end; states are views, nothing is copied.

    Args:
        samples: [B] sample indices, at least one.
        lengths: [B] tokens of each.
        tokens: [N].
        loss_mask: [N] 1 where the token is a training target. A sample's first token never is, as
            no state comes before it.
        states: [N, D] for each tap, in the store's array type.
        is_pinned: copy the tensors into pinned memory.
    """
    is_target = loss_mask == 1
    is_target[np.cumsum(lengths) - lengths] = False
    targets_at = np.flatnonzero(is_target)
    batch = Batch(
        samples=samples,
        lengths=lengths,
        states={tap: _as_tensor(rows) for tap, rows in states.items()},
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(targets_at - 1),
        targets=torch.from_numpy(tokens[targets_at].astype(np.int64)),
    )
    return batch.pinned() if is_pinned else batch


def no_states(store: StoreLike, taps: Sequence[str]) -> dict[str, Tensor]:
    """Return [0, D] for each tap, in the dtype of the states of a batch."""
    return {
        tap: _as_tensor(np.empty((0, store.tap_width(tap)), dtype=store.tap_dtype(tap)))
        for tap in taps
    }


def _as_tensor(rows: NDArray[Any]) -> Tensor:
    states = torch.from_numpy(rows)
    return states.view(torch.bfloat16) if states.dtype == torch.uint16 else states
