"""Pad packed batches to a few sizes, for kernels that are made for one shape each.

What is added are more samples, of zeros, behind those of the batch: attention keeps samples apart,
and no position of them is supervised, so loss and gradients stay the same up to rounding.

Letters: N tokens of a batch, B its samples, T the longest of them, M supervised pairs, D base
width; N', B', T' and M' are those of a size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.train.compile_settings import is_size
from carryon.train.data.batch import Batch
from carryon.train.modules.packed_attention import Packing, pack

MOST_SIZES = 4
"""Sizes that are chosen for a run: each takes as long to compile as the others."""
_FEWEST = 0.05
"""Share of a run's batches for which a size of their own is worth compiling."""
_HELD = 0.95
"""Share of these batches whose samples it has rows for. Rows for all would be empty in most."""
_SPREAD = 1.25
"""Supervised pairs that a size has room for, over their mean."""
_MULTIPLE = 8
"""Of all numbers but that of rows: kernels are fastest at such."""
_MAX_NUMBER = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedSize:
    """A size that batches are padded to."""

    tokens: int
    """N'."""
    rows: int
    """B': rows that attention spreads heads to, one a sample."""
    longest: int
    """T': tokens of such a row."""
    pairs: int
    """M'."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the size that `str` wrote.

        Raises:
            InputError: it is none, or its tokens do not fit its rows.
        """
        numbers = [int(each) for each in text.split("x")] if is_size(text) else []
        if len(numbers) == 4 and min(numbers) > 0 and max(numbers) <= _MAX_NUMBER:
            tokens, rows, longest, pairs = numbers
            if longest <= tokens <= rows * longest and pairs <= tokens:
                return cls(tokens=tokens, rows=rows, longest=longest, pairs=pairs)
        raise InputError(
            "padded_sizes: expected sizes TOKENSxROWSxLONGESTxPAIRS such as 1024x16x256x800, of "
            f"which the rows hold the tokens, got {text!a:.80}"
        )

    def __str__(self) -> str:
        """Return it as settings hold it."""
        return f"{self.tokens}x{self.rows}x{self.longest}x{self.pairs}"

    @property
    def work(self) -> int:
        """Products of queries and keys: what padding costs the most of."""
        return self.rows * self.longest**2

    def holds(self, lengths_B: NDArray[np.int64], *, pairs: int) -> bool:
        """Return whether samples of these lengths, with some pairs, can be padded to it."""
        added = self.tokens - int(lengths_B.sum())
        return (
            added >= 0
            and pairs <= self.pairs
            and int(lengths_B.max()) <= self.longest
            and len(lengths_B) + -(-added // self.longest) <= self.rows
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedInput:
    """A batch in the shape of a size, on its device: what `CarryOn.correct_packed` takes."""

    states: dict[str, Tensor]
    """[N', D] for each tap."""
    packing: Packing
    positions: Tensor
    """[M'] int64: those of the batch, then any others."""


def pad(batch: Batch, size: PaddedSize, *, taps: Sequence[str]) -> PaddedInput:
    """Return the states of a batch at some taps, padded to a size that holds it.

    An accelerator is not waited for.
    """
    added = size.tokens - batch.num_tokens
    full, rest = divmod(added, size.longest)
    lengths = np.concatenate([batch.lengths, [size.longest] * full, [rest] * (rest > 0)])
    packing = pack(
        torch.from_numpy(lengths.astype(np.int64)), num_rows=size.rows, longest=size.longest
    )
    # Not all the same: their gradients, which are zero, would be added one after another.
    others = torch.arange(size.pairs - batch.num_targets, device=batch.positions.device)
    return PaddedInput(
        states={tap: _with_zeros(batch.states[tap], size.tokens) for tap in taps},
        packing=packing.to(batch.positions.device),
        positions=torch.cat([batch.positions, others]),
    )


def _with_zeros(states_ND: Tensor, num_tokens: int) -> Tensor:
    padded = states_ND.new_empty(num_tokens, states_ND.shape[1])
    padded[: len(states_ND)] = states_ND
    padded[len(states_ND) :] = 0
    return padded


def fitting_size(
    sizes: Iterable[PaddedSize], lengths_B: NDArray[np.int64], *, pairs: int
) -> PaddedSize | None:
    """Return the size that pads a batch with the least work; None: no size holds it."""
    fitting = [size for size in sizes if size.holds(lengths_B, pairs=pairs)]
    return min(fitting, key=lambda size: size.work, default=None)


def choose_sizes(
    batches: Iterable[NDArray[np.int64]], *, most_tokens: int, density: float
) -> tuple[PaddedSize, ...]:
    """Return a few sizes that hold nearly all batches of a run.

    Args:
        batches: lengths [B] of the samples of each.
        most_tokens: of a batch of several samples; single samples may be longer.
        density: supervised pairs for each token, on average.
    """
    shapes = [(int(each.sum()), len(each), int(each.max())) for each in batches if len(each)]
    shapes = [shape for shape in shapes if shape[0] <= most_tokens]
    if not shapes:
        return ()
    N, B, T = np.array(shapes, dtype=np.int64).T
    tokens = rounded_up(int(N.max()))
    pairs = min(tokens, rounded_up(int(np.ceil(density * _SPREAD * tokens))))
    # Of rows half as long each time; the last also for what is shorter.
    longests = [rounded_up(-(-int(T.max()) // 2**number)) for number in range(MOST_SIZES)]
    sizes = []
    for longest, shorter in zip(longests, [*longests[1:], 0], strict=True):
        is_own = (longest >= T) & (shorter < T)
        if is_own.mean() < _FEWEST:
            continue
        rows = B[is_own] + -(-(tokens - N[is_own]) // longest)
        held = int(np.quantile(rows, _HELD, method="higher"))
        sizes.append(PaddedSize(tokens=tokens, rows=held, longest=longest, pairs=pairs))
    return tuple(sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Padded:
    """What sizes do to the batches of a run."""

    held: float
    """Share of the batches that a size holds."""
    rows: float
    """Rows of attention, empty ones included, against those without padding."""


def measure_padding(batches: Iterable[NDArray[np.int64]], sizes: Sequence[PaddedSize]) -> Padded:
    """Return what sizes do to batches, of which the lengths [B] are given."""
    held = total = padded = plain = 0
    for lengths in batches:
        total += 1
        if (size := fitting_size(sizes, lengths, pairs=0)) is not None:
            held += 1
            padded += size.rows * size.longest
            plain += len(lengths) * int(lengths.max())
    return Padded(held=held / max(1, total), rows=padded / max(1, plain))


def rounded_up(number: int) -> int:
    """Return a number as sizes have it."""
    return -(-number // _MULTIPLE) * _MULTIPLE
