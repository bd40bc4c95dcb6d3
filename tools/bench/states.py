"""Samples with hidden states to measure on: synthetic ones of a given shape, or those of a store.

Letters: N rows of all samples one after another, D width, S samples.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.corpus.samples import Sample
from carryon.cache.errors import InputError
from carryon.cache.format.quantization import bfloat16_bits
from carryon.cache.store.reader import Store

SYNTHETIC = "synthetic"
VOCABULARY = 256
"""Number of token ids in synthetic samples."""
_CHANNEL_SPREAD = 0.4
"""Standard deviation of the logarithm of the channels' RMS: 0.38 to 0.40 in the final states of a
135M Llama on two corpora, 0.53 in its middle."""
_BLOCK_ROWS = 4096  # generated at a time: 42 MB of float32 at D = 2,560


@dataclass(frozen=True, kw_only=True, slots=True)
class StateSet:
    """Samples and their states in memory, concatenated without padding."""

    name: str
    taps: list[str]
    """The last one is the head's input."""
    lengths: NDArray[np.int32]
    """[S] tokens of each sample."""
    tokens: NDArray[np.int32]
    """[N] int32."""
    hidden: dict[str, NDArray[np.uint16]]
    """[N, D] bits of bfloat16 for each tap."""

    @property
    def starts(self) -> NDArray[np.int64]:
        """[S] first row of each sample."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.tokens)

    @property
    def width(self) -> int:
        """D."""
        return int(self.hidden[self.taps[0]].shape[1])

    @property
    def raw_bytes(self) -> int:
        """Bytes of the states at all taps."""
        return self.num_tokens * self.width * 2 * len(self.taps)

    def rows_of(self, sample: int) -> slice:
        """Return the rows of a sample."""
        start = int(self.starts[sample])
        return slice(start, start + int(self.lengths[sample]))

    def token_ids(self, sample: int) -> Tensor:
        """Return the tokens of a sample, [S] int64."""
        return torch.from_numpy(self.tokens[self.rows_of(sample)].astype(np.int64))

    def tensor(self, tap: str, sample: int) -> Tensor:
        """Return the states of a sample, [S, D] bfloat16, on the same memory."""
        return torch.from_numpy(self.hidden[tap][self.rows_of(sample)]).view(torch.bfloat16)

    def samples(self) -> list[Sample]:
        """Return the samples of a corpus; every token but the first is a target."""
        samples = []
        for index, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            loss_mask = np.ones(length, dtype=np.uint8)
            loss_mask[0] = 0
            samples.append(
                Sample(
                    id=f"{self.name}-{index}",
                    tokens=self.tokens[start : start + length],
                    loss_mask=loss_mask,
                    char_end=np.arange(1, length + 1, dtype=np.int32),
                    is_held_out=False,
                )
            )
        return samples


def make_states(
    name: str,
    *,
    num_samples: int,
    width: int,
    num_taps: int,
    mean_tokens: int,
    max_tokens: int,
    seed: int,
) -> StateSet:
    """Generate samples of log-normal length, with Gaussian states whose channels differ in size.

    Lengths are clipped to 8 to `max_tokens`; the last tap is `final`.
    """
    random = np.random.default_rng(seed)
    spread = 0.8
    drawn = random.lognormal(np.log(mean_tokens) - spread**2 / 2, spread, num_samples)
    lengths = np.clip(drawn, min(8, max_tokens), max_tokens).astype(np.int32)
    num_rows = int(lengths.sum())
    taps = [*(f"layer.{number + 1}" for number in range(num_taps - 1)), "final"]
    return StateSet(
        name=name,
        taps=taps,
        lengths=lengths,
        tokens=random.integers(0, VOCABULARY, num_rows).astype(np.int32),
        hidden={tap: _gaussian(random, num_rows, width) for tap in taps},
    )


def samples_of(store: Store, *, max_tokens: int | None = None) -> list[Sample]:
    """Return the samples of a store in unit order, without states.

    Args:
        store: the store.
        max_tokens: stop before this many tokens. None: all samples.
    """
    samples: list[Sample] = []
    num_tokens = 0
    for unit in store.iter_units(taps=[]):
        for index in unit.samples:
            rows = unit.rows_of(index)
            num_tokens += rows.stop - rows.start
            if samples and max_tokens is not None and num_tokens > max_tokens:
                return samples
            samples.append(
                Sample(
                    id=store.sample_id(index),
                    tokens=unit.tokens[rows],
                    loss_mask=unit.loss_mask[rows],
                    char_end=unit.char_end[rows],
                    is_held_out=bool(store.sample_held_out[index]),
                    group=int(store.sample_groups[index]),
                    role=int(store.sample_roles[index]),
                )
            )
    return samples


def take_states(name: str, store: Store, *, max_tokens: int) -> StateSet:
    """Return the first samples of a store in unit order, up to `max_tokens` tokens.

    `prenorm` is omitted: the copies have another norm, which their probe would not match.

    Raises:
        InputError: the store does not hold exact bfloat16 states.
    """
    require_exact(store)
    lengths: list[int] = []
    tokens: list[NDArray[np.int32]] = []
    taps = [tap for tap in store.taps if tap != "prenorm"]
    hidden: dict[str, list[NDArray[np.uint16]]] = {tap: [] for tap in taps}
    for unit in store.iter_units(taps=taps):
        for sample in unit.samples:
            rows = unit.rows_of(sample)
            if lengths and sum(lengths) + rows.stop - rows.start > max_tokens:
                break
            lengths.append(rows.stop - rows.start)
            tokens.append(unit.tokens[rows])
            for tap, states in unit.hidden.items():
                hidden[tap].append(states[rows].copy())
        else:
            continue
        break
    return StateSet(
        name=name,
        taps=taps,
        lengths=np.array(lengths, dtype=np.int32),
        tokens=np.concatenate(tokens),
        hidden={tap: np.concatenate(parts) for tap, parts in hidden.items()},
    )


def require_exact(store: Store) -> None:
    """Check that a store holds exact bfloat16 states.

    Raises:
        InputError: it does not.
    """
    settings = store.manifest.settings
    if (settings["profile"], settings["dtype"]) != ("exact", "bfloat16"):
        raise InputError(
            f"{store.root}: expected a store of exact bfloat16 states, got profile "
            f"{settings['profile']}, dtype {settings['dtype']}. Fix: extract without --profile"
        )


def _gaussian(random: np.random.Generator, num_rows: int, width: int) -> NDArray[np.uint16]:
    scale = random.lognormal(0.0, _CHANNEL_SPREAD, width).astype(np.float32)
    bits = np.empty((num_rows, width), dtype=np.uint16)
    for first in range(0, num_rows, _BLOCK_ROWS):
        block = bits[first : first + _BLOCK_ROWS]
        block[:] = bfloat16_bits(random.standard_normal(block.shape, dtype=np.float32) * scale)
    return bits
