"""Contamination: the fraction of held-out targets that also occur in the training half.

A held-out target counts if the 32 tokens up to it, itself included, occur in a training sample,
and all those of a shorter sample that is one of the training half too: the held-out loss then
rewards memorizing. Text that is never a target, such as a system prompt,
does not count. Only tokens are read, no hidden states.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.store.samples import Unit
from carryon.cache.store.view import StoreLike
from carryon.train.data.split import Split, sample_units

NGRAM = 32
"""Tokens of an n-gram; a power of two."""
WARN_ABOVE = 0.05
"""Contamination above which the held-out loss draws a warning."""
_FACTOR = 0x9E3779B97F4A7C15  # odd: multiplication modulo 2**64 is then one-to-one


@dataclass(frozen=True, kw_only=True, slots=True)
class Contamination:
    """Overlap of the two halves of a store."""

    ngrams: int
    """Held-out targets that are compared: with 32 tokens up to them within their sample, and all of
    shorter samples."""
    shared: int
    """Those whose 32 tokens, or whose short sample, also occur in the training half."""
    train_targets: int
    """Targets of the training half."""
    held_out_targets: int
    """Targets of the held-out half."""

    @property
    def share(self) -> float:
        """shared / ngrams; 0 if none is compared."""
        return self.shared / self.ngrams if self.ngrams else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def measure_contamination(store: StoreLike, split: Split) -> Contamination:
    """Return the overlap of the halves of `store`; memory grows with the held-out half only."""
    hashes = [np.empty(0, dtype=np.uint64)]
    held_out_targets = 0
    for unit, inside in _units_of(store, split.held_out):
        hashes.append(_ngrams(unit, inside, is_targets_only=True))
        held_out_targets += _num_targets(unit, inside)
    held_out, counts = np.unique(np.concatenate(hashes), return_counts=True)
    is_shared = np.zeros(len(held_out), dtype=np.bool_)
    train_targets = 0
    for unit, inside in _units_of(store, split.train):
        train_targets += _num_targets(unit, inside)
        if len(held_out):
            in_train = _ngrams(unit, inside, is_targets_only=False)
            places = np.minimum(np.searchsorted(held_out, in_train), len(held_out) - 1)
            is_shared[places[held_out[places] == in_train]] = True
    return Contamination(
        ngrams=int(counts.sum()),
        shared=int(counts[is_shared].sum()),
        train_targets=train_targets,
        held_out_targets=held_out_targets,
    )


def hash_ngrams(tokens: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each n-gram of 32 tokens, [T - 31].

    Each is combined from the hashes of its two halves: five passes over the tokens.
    """
    hashes = _scrambled(tokens.astype(np.uint64) + np.uint64(1))
    length, factor = 1, _FACTOR
    while length < NGRAM:
        hashes = hashes[:-length] * np.uint64(factor) + hashes[length:]
        length, factor = 2 * length, factor * factor % 2**64
    return hashes


def _scrambled(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values * np.uint64(_FACTOR)
    values ^= values >> np.uint64(29)
    return values * np.uint64(0xBF58476D1CE4E5B9)


def _units_of(
    store: StoreLike, samples: NDArray[np.int64]
) -> Iterator[tuple[Unit, NDArray[np.int64]]]:
    """Yield each unit that holds some of `samples`, with its tokens, and those samples."""
    units = sample_units(store)
    for unit in np.unique(units[samples]).tolist():
        yield store.read_unit(unit, taps=[]), samples[units[samples] == unit]


def _ngrams(unit: Unit, samples: NDArray[np.int64], *, is_targets_only: bool) -> NDArray[np.uint64]:
    """Return the hashes of the n-grams that lie within one of `samples`, by their last token."""
    places = samples - unit.samples.start
    is_taken = np.zeros(len(unit.tokens), dtype=np.bool_)
    spans = zip(unit.starts[places].tolist(), unit.lengths[places].tolist(), strict=True)
    for start, length in spans:
        is_taken[start + NGRAM - 1 : start + length] = True  # empty if it is shorter
    if is_targets_only:
        is_taken &= unit.loss_mask == 1
    short = _short_samples(unit, places, is_targets_only=is_targets_only)
    if len(unit.tokens) < NGRAM:
        return short
    return np.concatenate([hash_ngrams(unit.tokens)[is_taken[NGRAM - 1 :]], short])


def _short_samples(
    unit: Unit, places: NDArray[np.int64], *, is_targets_only: bool
) -> NDArray[np.uint64]:
    """Return the hashes of whole samples of less than 32 tokens, each for each of its targets."""
    hashes = list[int]()
    for place in places[unit.lengths[places] < NGRAM].tolist():
        start, stop = unit.starts[place], unit.starts[place] + unit.lengths[place]
        content = unit.tokens[start:stop].tobytes()
        found = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        times = int((unit.loss_mask[start + 1 : stop] == 1).sum()) if is_targets_only else 1
        hashes += [found] * times
    return np.array(hashes, dtype=np.uint64)


def _num_targets(unit: Unit, samples: NDArray[np.int64]) -> int:
    """Return the targets of `samples`; a sample's first token is never one."""
    places = samples - unit.samples.start
    sums = np.concatenate([[0], np.cumsum(unit.loss_mask == 1)])
    starts = unit.starts[places]
    return int((sums[starts + unit.lengths[places]] - sums[starts + 1]).sum())
