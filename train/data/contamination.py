"""How much of the held-out half stands in the training half as well, in runs of 32 tokens.

Where the halves repeat each other the held-out loss rewards learning by heart. What is counted is
the share of held-out targets whose last 32 tokens, themselves included, stand somewhere in a
training sample: text that is never a target, such as a system prompt in front of every sample,
does not count. Needs the tokens only; no hidden state is read.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.store.samples import Unit
from carryon.cache.store.view import StoreLike
from carryon.train.data.split import Split

NGRAM = 32
"""Tokens of a run; a power of two."""
WARN_ABOVE = 0.05
"""Share from which on the held-out loss is not to be believed."""
_FACTOR = 0x9E3779B97F4A7C15  # odd, so that nothing is lost modulo 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class Contamination:
    """What two halves of a store have in common."""

    ngrams: int
    """Held-out targets with 32 tokens up to them within their sample."""
    shared: int
    """Those whose 32 tokens stand in the training half too."""
    train_targets: int
    """Supervised tokens of the training half."""
    held_out_targets: int
    """Supervised tokens of the held-out half."""

    @property
    def share(self) -> float:
        """shared / ngrams; 0 where no sample is long enough."""
        return self.shared / self.ngrams if self.ngrams else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def measure_contamination(
    store: StoreLike, split: Split, *, units: NDArray[np.int64]
) -> Contamination:
    """Return what the halves of `store` have in common; memory grows with the held-out half only.

    Args:
        store: whose tokens are read, unit by unit.
        split: its halves.
        units: [S] unit of each sample.
    """
    wanted = [np.empty(0, dtype=np.uint64)]
    held_out_targets = 0
    for unit, inside in _units_of(store, split.held_out, units):
        wanted.append(_ngrams(unit, inside, is_targets_only=True))
        held_out_targets += _num_targets(unit, inside)
    held_out, counts = np.unique(np.concatenate(wanted), return_counts=True)
    is_shared = np.zeros(len(held_out), dtype=np.bool_)
    train_targets = 0
    for unit, inside in _units_of(store, split.train, units):
        train_targets += _num_targets(unit, inside)
        if len(held_out):
            found = _ngrams(unit, inside, is_targets_only=False)
            places = np.minimum(np.searchsorted(held_out, found), len(held_out) - 1)
            is_shared[places[held_out[places] == found]] = True
    return Contamination(
        ngrams=int(counts.sum()),
        shared=int(counts[is_shared].sum()),
        train_targets=train_targets,
        held_out_targets=held_out_targets,
    )


def hash_ngrams(tokens: NDArray[np.int32]) -> NDArray[np.uint64]:
    """Return a hash of each run of 32 tokens, [T - 31]; 64 bits, so equal hashes mean equal runs.

    Each run is the join of two half as long: five passes over the tokens.
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
    store: StoreLike, samples: NDArray[np.int64], units: NDArray[np.int64]
) -> Iterator[tuple[Unit, NDArray[np.int64]]]:
    """Yield each unit that holds some of `samples`, with its tokens, and those samples."""
    for unit in np.unique(units[samples]).tolist():
        yield store.read_unit(unit, taps=[]), samples[units[samples] == unit]


def _ngrams(unit: Unit, samples: NDArray[np.int64], *, is_targets_only: bool) -> NDArray[np.uint64]:
    """Return the hashes of the runs that lie within one of `samples`, by their last token."""
    places = samples - unit.samples.start
    is_wanted = np.zeros(len(unit.tokens), dtype=np.bool_)
    spans = zip(unit.starts[places].tolist(), unit.lengths[places].tolist(), strict=True)
    for start, length in spans:
        is_wanted[start + NGRAM - 1 : start + length] = True  # empty where it is shorter
    if is_targets_only:
        is_wanted &= unit.loss_mask == 1
    if len(unit.tokens) < NGRAM:
        return np.empty(0, dtype=np.uint64)
    return hash_ngrams(unit.tokens)[is_wanted[NGRAM - 1 :]]


def _num_targets(unit: Unit, samples: NDArray[np.int64]) -> int:
    """Return the supervised tokens of `samples`; a sample's first token is never one."""
    places = samples - unit.samples.start
    sums = np.concatenate([[0], np.cumsum(unit.loss_mask == 1)])
    starts = unit.starts[places]
    return int((sums[starts + unit.lengths[places]] - sums[starts + 1]).sum())
