"""The frozen head as the loss reads it: on the device, or a few thousand rows at a time.

Nothing here is trained. Letters: M positions, D base width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from carryon.cache.base.lm_head import Head
from carryon.cache.device import (
    pick_head_dtype,
    return_freed_memory,
    reuse_freed_memory,
    to_device,
)
from carryon.cache.errors import InputError
from carryon.cache.store.view import StoreLike
from carryon.train.config import LossSettings

CPU_BLOCK_ROWS = 4096
"""Rows that a CPU multiplies at one time. 2,048 to 12,288 are equal at width 576; 49,152 take a
quarter longer, as the kernel's copies of the rows no longer fit the cache."""
WIDE = 1536
"""Width from which a CPU multiplies in float32 by plain products instead of its attention kernel:
as fast (54 against 58 GFLOP/s at 5,120), and without a second [M, D]."""
WIDE_BLOCK_ROWS = 1024
"""Rows of such a head that are multiplied at one time; 512 to 2,048 are equal."""
STREAMED_BLOCK_BYTES = 24 << 20
"""Bytes of rows in one block where the head is not on the device; a CPU's kernel makes two
rearranged copies of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadBlock:
    """Some rows of the head, ready to be multiplied."""

    first: int
    """Index of its first row among all that are multiplied."""
    weight: Tensor
    """[rows, D], on the device, in the dtype of the products."""
    bias: Tensor | None
    """[rows] float32, on the device, or None."""
    log_weight: float = 0.0
    """Log of the number of vocabulary rows that each of them stands for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrequentRows:
    """The rows in every step of a sampled softmax, and those it samples from."""

    blocks: tuple[HeadBlock, ...]
    """The rows of every step."""
    is_frequent: Tensor
    """[V] bool, on the host: whether a token is among them."""
    strata: tuple[Tensor, ...]
    """int64, on the host: all other tokens, in groups that are sampled from one by one."""
    num_sampled: int
    """How many of the others are sampled for a step, at most."""

    def counts(self) -> list[int]:
        """Return how many are sampled from each stratum: the same number, or all of it.

        What a small one leaves over goes to the later ones.
        """
        counts, left = [], self.num_sampled
        for number, stratum in enumerate(self.strata):
            counts.append(min(len(stratum), left // (len(self.strata) - number)))
            left -= counts[-1]
        return counts


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenHead:
    """logits = cap(scale * (W x + bias)), with cap(z) = softcap * tanh(z / softcap)."""

    weight: Tensor
    """W, [V, D], where it is stored and in the dtype it has there."""
    bias: Tensor | None
    """[V] float32, on the device, or None."""
    logit_scale: float
    """Multiplies the logits before the cap."""
    softcap: float | None
    """Soft limit of the logits, or None."""
    dtype: torch.dtype
    """Of the matrix products: bfloat16 or float32."""
    device: torch.device
    """Where they are computed."""
    block_rows: int
    """Rows that are multiplied at one time."""
    gradient_filter: float = 0.0
    """Probability below which a row is left out of the gradient (gradient_filter.py). 0: none."""
    mean_row: Tensor | None = None
    """[D] float32, on the device: the mean of all rows, if there is a gradient filter."""
    frequent: FrequentRows | None = None
    """What training steps sample from. None: they multiply all rows."""
    parts: tuple[HeadBlock, ...] | None = None
    """Rows that stand for all. None: all of them."""
    way: str = "attention"
    """How a CPU computes the loss with its gradient (ways.py)."""

    is_rough: bool = False
    """Whether losses without gradient may be off by 0.01 a target, and by 1e-4 on average: a CPU
    then needs a quarter of the time over a large vocabulary."""

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.weight)

    @property
    def trained_rows(self) -> int:
        """Rows that a step multiplies for each target, without the step's own rare targets."""
        if self.frequent is None:
            return self.vocab_size
        return sum(len(each.weight) for each in self.frequent.blocks) + self.frequent.num_sampled

    @property
    def is_wide(self) -> bool:
        """Whether a CPU multiplies it by plain products."""
        return _is_wide(self.weight.shape[1], self.device, self.dtype)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which modules multiply matrices in the head's dtype."""
        if self.dtype != torch.bfloat16:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def blocks(self) -> Iterator[HeadBlock]:
        """Yield all rows in order, block by block; transferred blocks are not kept."""
        if self.parts is not None:
            yield from self.parts
            return
        for first in range(0, self.vocab_size, self.block_rows):
            rows = slice(first, first + self.block_rows)
            yield HeadBlock(
                first=first,
                weight=to_device(self.weight[rows], self.device).to(self.dtype),
                bias=None if self.bias is None else self.bias[rows],
            )

    def rows(self, token_ids: Tensor) -> Tensor:
        """Return the rows of tokens [M], [M, D] on the device, rounded as in the blocks."""
        picked = self.weight[to_device(token_ids, self.weight.device)]
        return to_device(picked, self.device).to(self.dtype)


def place_head(store: StoreLike, settings: LossSettings, *, device: torch.device) -> FrozenHead:
    """Return a store's head placed as `settings` say.

    Raises:
        InputError: a gradient filter with bfloat16 on a CPU.
    """
    head = store.head(is_mapped=settings.head_place == "mapped")
    dtype = pick_head_dtype(settings.head_dtype, device)
    if settings.gradient_filter > 0 and device.type == "cpu" and dtype != torch.float32:
        raise InputError(
            "gradient_filter: expected products in float32, as a CPU would round the loss with it, "
            "got bfloat16. Fix: add --head-dtype float32"
        )
    placed = frozen_head(
        head,
        device=device,
        dtype=dtype,
        is_resident=settings.head_place == "device",
        block_rows=settings.chunk_vocabulary,
    )
    if settings.loss_way != "auto":
        placed = replace(placed, way=settings.loss_way)
    return with_gradient_filter(placed, settings.gradient_filter)


def with_gradient_filter(head: FrozenHead, least: float) -> FrozenHead:
    """Return `head` with a filter that leaves out probabilities below `least`; 0: unchanged."""
    if least == 0:
        return head
    sums = [block.weight.float().sum(dim=0) for block in head.blocks()]
    mean_row = torch.stack(sums).sum(dim=0) / head.vocab_size
    return replace(head, gradient_filter=least, mean_row=mean_row)


def frozen_head(
    head: Head,
    *,
    device: torch.device,
    dtype: torch.dtype,
    is_resident: bool = True,
    block_rows: int = 0,
) -> FrozenHead:
    """Return a store's head for products of `dtype` on `device`.

    Args:
        head: of the store.
        device: where it is multiplied.
        dtype: of the products.
        is_resident: copy all of it to `device` in `dtype`; else it stays as and where it is.
        block_rows: rows that are multiplied at one time. 0: chosen for the device.
    """
    if device.type == "cpu":
        (reuse_freed_memory if is_resident else return_freed_memory)()
    weight = torch.from_numpy(head.weight)
    if weight.dtype == torch.uint16:  # bfloat16 bits
        weight = weight.view(torch.bfloat16)
    return FrozenHead(
        weight=weight.to(device, dtype) if is_resident else weight,
        bias=None if head.bias is None else torch.from_numpy(head.bias).to(device),
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        dtype=dtype,
        device=device,
        block_rows=block_rows or _block_rows(head, device, dtype, is_resident=is_resident),
    )


def _is_wide(width: int, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.float32 and width >= WIDE


def _block_rows(head: Head, device: torch.device, dtype: torch.dtype, *, is_resident: bool) -> int:
    if _is_wide(head.width, device, dtype):
        return WIDE_BLOCK_ROWS
    if not is_resident:
        return max(256, STREAMED_BLOCK_BYTES // (2 * head.width))
    return CPU_BLOCK_ROWS if device.type == "cpu" else head.vocab_size
