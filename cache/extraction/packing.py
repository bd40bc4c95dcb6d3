"""Packing of samples into units, and of a unit's samples into batches: pure and seeded.

Samples are shuffled with the seed and laid one after another. A sample that no longer fits opens
the next unit, so none crosses a unit and every writer owns its shards. Held-out samples come
last, in separate units: evaluation reads nothing else. Reading units in sequence is already well
mixed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.samples import SampleTable
from carryon.cache.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitPlan:
    """The place of each of S samples, in the order of the token axis."""

    order: NDArray[np.int64]
    """[S] index, in the corpus, of each planned sample."""
    unit: NDArray[np.int64]
    """[S] its unit, counted from the first unit of this plan."""
    start: NDArray[np.int64]
    """[S] its first row, counted from the first row of this plan."""
    num_units: int
    """Units of this plan."""


def plan_samples(samples: SampleTable, *, unit_tokens: int, seed: int) -> UnitPlan:
    """Lay samples out in units of `unit_tokens` rows; see `plan_units`."""
    return plan_units(samples.lengths, samples.held_out, unit_tokens=unit_tokens, seed=seed)


def plan_units(
    lengths: NDArray[np.int32], held_out: NDArray[np.bool_], *, unit_tokens: int, seed: int
) -> UnitPlan:
    """Lay samples out in units of `unit_tokens` rows.

    Args:
        lengths: [S] tokens of each sample, all at least 1.
        held_out: [S] whether a sample is held out.
        unit_tokens: rows of a unit.
        seed: of the shuffle.

    Raises:
        InputError: a sample is longer than a unit.
    """
    if len(lengths) and int(lengths.max()) > unit_tokens:
        raise InputError(
            f"unit_tokens: a sample of {int(lengths.max())} tokens does not fit in a unit of "
            f"{unit_tokens}: raise unit_tokens or lower max_tokens"
        )
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    is_held_out = held_out[shuffled]
    order = np.concatenate([shuffled[~is_held_out], shuffled[is_held_out]]).astype(np.int64)
    num_train = int((~is_held_out).sum())
    halves = np.split(lengths[order], [num_train])
    parts = [_fill_units(half, unit_tokens=unit_tokens) for half in halves if len(half)]
    unit, start = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    num_units = 0
    for own_unit, own_start in parts:
        unit = np.concatenate([unit, own_unit + num_units])
        start = np.concatenate([start, own_start + num_units * unit_tokens])
        num_units = int(unit[-1]) + 1
    return UnitPlan(order=order, unit=unit, start=start, num_units=num_units)


def _fill_units(
    lengths: NDArray[np.int32], *, unit_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return unit and first row of each of S consecutive samples, [S] and [S]; S is 1 or more."""
    ends = np.cumsum(lengths, dtype=np.int64)
    firsts = [0]  # first sample of each unit: a step a unit, as samples may be many millions
    while firsts[-1] < len(ends):
        before = int(ends[firsts[-1] - 1]) if firsts[-1] else 0
        firsts.append(int(np.searchsorted(ends, before + unit_tokens, side="right")))
    unit = np.repeat(np.arange(len(firsts) - 1), np.diff(firsts)).astype(np.int64)
    starts = ends - lengths
    return unit, starts - starts[firsts[:-1]][unit] + unit * unit_tokens


def plan_batches(lengths: NDArray[np.int32], *, batch_tokens: int) -> list[NDArray[np.int64]]:
    """Group a unit's samples by length into right-padded batches of at most `batch_tokens`.

    A pure function of the unit: a unit that is computed again has the same batches.

    Args:
        lengths: [n] tokens of each sample.
        batch_tokens: rows x longest row; a longer single sample still makes a batch.

    Returns:
        Indices into `lengths`, longest first, so that memory runs out at once or not at all.
    """
    by_length = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches: list[NDArray[np.int64]] = []
    first = 0
    while first < len(by_length):
        rows = max(1, batch_tokens // int(lengths[by_length[first]]))
        batches.append(by_length[first : first + rows])
        first += rows
    return batches


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Token ids that go through the base at one time, and where their states belong."""

    samples: NDArray[np.int64]
    """[B] index of each row's sample within the unit."""
    lengths: NDArray[np.int32]
    """[B] tokens of each."""
    ids: NDArray[np.int64]
    """[B, T] token ids, padded on the right."""
    places: NDArray[np.int64]
    """[n] index of each token that is no pad among all B x T of them."""
    rows: NDArray[np.int64]
    """[n] its row in the unit."""


def make_batch(
    samples: NDArray[np.int64],
    *,
    lengths: NDArray[np.int32],
    starts: NDArray[np.int64],
    tokens: NDArray[np.int32],
) -> Batch:
    """Return the batch of some samples of a unit.

    Args:
        samples: [B] which, as of `plan_batches`.
        lengths: [S] tokens of each sample of the unit.
        starts: [S] first row of each.
        tokens: [R] token ids of the unit's rows.
    """
    own = lengths[samples]
    longest = int(own.max())
    firsts = np.cumsum(own, dtype=np.int64) - own  # of each sample, without pads
    within = np.arange(int(own.sum()), dtype=np.int64) - np.repeat(firsts, own)
    places = np.repeat(np.arange(len(samples), dtype=np.int64) * longest, own) + within
    rows = np.repeat(starts[samples], own) + within
    ids = np.zeros(len(samples) * longest, dtype=np.int64)
    ids[places] = tokens[rows]
    return Batch(
        samples=samples,
        lengths=own,
        ids=ids.reshape(len(samples), longest),
        places=places,
        rows=rows,
    )
