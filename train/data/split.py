"""Split samples into a training and a held-out half; the same samples and seed give the same."""

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.report import LOST_HELD_OUT, Report
from carryon.cache.errors import InputError
from carryon.cache.store.reader import Store
from carryon.cache.store.view import StoreLike

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The two halves of a store's samples; no sample is in both."""

    train: NDArray[np.int64]
    """Indices of the samples to train on."""
    held_out: NDArray[np.int64]
    """Indices of the samples to evaluate on."""


def split_samples(
    marked: NDArray[np.uint8],
    *,
    share: float,
    seed: int,
    digest: str,
    groups: NDArray[np.uint64] | None = None,
) -> Split:
    """Return the split that the store marks, or a seeded one if it marks none.

    Samples of one group are of one record and share text, or of records that their `split_group`
    keeps together, so they are in one half. Of a store with a single group, such as one long text
    in pieces, each sample is a group.

    Args:
        marked: [S] 1 where the store marks a sample as held out.
        share: fraction of samples to hold out if none is marked; at least one group is.
        seed: of the choice.
        digest: of the samples; stores of equal size are then split differently.
        groups: [S] equal for samples of one group. None: each sample is a group.

    Raises:
        InputError: one of the halves would be empty.
    """
    is_held_out = marked.astype(bool)
    if len(marked) > 1:
        numbers, sizes = _number_groups(groups, len(marked))
        if is_held_out.any():
            is_held_out = np.bincount(numbers, weights=is_held_out, minlength=len(sizes)) > 0
        else:
            random = np.random.default_rng([seed, int(digest[:16], 16)])
            chosen = _choose_groups(sizes, share=share, random=random)
            is_held_out = np.zeros(len(sizes), dtype=bool)
            is_held_out[chosen] = True
        is_held_out = is_held_out[numbers]
    if is_held_out.all() or not is_held_out.any():
        raise InputError(
            f"the store has {len(marked)} samples, {int(is_held_out.sum())} of them held out: "
            "expected at least one to train on and one to evaluate on"
        )
    return Split(train=np.flatnonzero(~is_held_out), held_out=np.flatnonzero(is_held_out))


def split_of(store: StoreLike, *, share: float, seed: int) -> Split:
    """Return the split of one store: the same arguments give the same one, as in a card's `split`.

    Raises:
        InputError: one of the halves would be empty.
    """
    return split_samples(
        store.sample_held_out,
        share=share,
        seed=seed,
        digest=store.samples_digest,
        groups=store.sample_groups,
    )


def part_digests(store: StoreLike) -> list[str]:
    """Return the digest of the samples of each part of one store, wherever the part stands."""
    if not isinstance(store, Store):
        return []
    manifest, name = store.manifest, store.name
    numbers = range(1, len(manifest.parts) + 1)
    return [manifest.of_part(number, name=name).samples_digest for number in numbers]


def split_marked(store: StoreLike, *, share: float, seed: int) -> Split:
    """Return the split of a store to train on; log where groups decide otherwise than expected.

    Raises:
        InputError: one of the halves would be empty, or the data marked held-out samples of
            which none is left.
    """
    refuse_lost_marks(store)
    split = split_of(store, share=share, seed=seed)
    num_marked = int(store.sample_held_out.sum())
    if num_marked and (num_more := len(split.held_out) - num_marked):
        logger.info(
            f"{store.name}: {num_marked:,} samples are marked as held out, {num_more:,} more "
            "are held out with them: they are of the same records or split groups"
        )
    if store.num_samples > 1 and len(set(store.sample_groups.tolist())) == 1:
        logger.info(
            f"{store.name}: all samples are of one record or split group: they are split one by one"
        )
    return split


def _number_groups(
    groups: NDArray[np.uint64] | None, num_samples: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of each sample's group [S], by first appearance, and each group's size."""
    if groups is None or (groups == groups[0]).all():
        return np.arange(num_samples), np.ones(num_samples, dtype=np.int64)
    _, firsts, inverse, sizes = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    by_appearance = np.argsort(firsts)
    numbers = np.empty(len(firsts), dtype=np.int64)
    numbers[by_appearance] = np.arange(len(firsts))
    return numbers[inverse], sizes[by_appearance]


def _choose_groups(
    sizes: NDArray[np.int64], *, share: float, random: np.random.Generator
) -> NDArray[np.int64]:
    """Return random groups with `share` of all samples, or as many as fit within it.

    A group that is larger than this by itself is left for training, unless all are: then the
    smallest is chosen.
    """
    num_samples = int(sizes.sum())
    wanted = min(num_samples - 1, max(1, round(share * num_samples)))
    order = random.permutation(len(sizes))
    fitting = order[sizes[order] <= wanted]
    if not len(fitting):
        return order[[int(np.argmin(sizes[order]))]]
    number = int(np.searchsorted(np.cumsum(sizes[fitting]), wanted, side="right"))
    return fitting[:number]


def refuse_lost_marks(store: StoreLike) -> None:
    """Check that a store whose corpus marked records as held out has one of them left.

    Raises:
        InputError: none of them gave a sample, so that a split would have to be made up.
    """
    if not isinstance(store, Store) or store.sample_held_out.any():
        return
    reports = [Report.from_dict(part.report) for part in store.manifest.parts if part.report]
    lost = [note for each in reports for note in each.notes if note.reason == LOST_HELD_OUT]
    if lost:
        raise InputError(
            f"{store.name}: expected held-out samples, as its data marked some, got none: "
            f"{sum(note.records for note in lost):,} marked records gave no sample, the first is "
            f"{lost[0].first}. Fix: extract again with marks on records that have targets "
            "(--mask, --max-tokens), or without marks"
        )


def refuse_pairs(store: StoreLike) -> None:
    """Check that a store holds samples to train on, not preference pairs.

    Raises:
        InputError: it holds preference pairs.
    """
    if num_halves := int(np.count_nonzero(store.sample_roles)):
        raise InputError(
            f"{store.name}: expected samples to train on, got {num_halves:,} halves of preference "
            "pairs. Fix: use another --store; pairs can be stored and read, not trained on"
        )


def sample_units(store: StoreLike) -> NDArray[np.int64]:
    """Return the unit of each sample, [S]."""
    return np.asarray(store.sample_starts // store.unit_tokens, dtype=np.int64)
