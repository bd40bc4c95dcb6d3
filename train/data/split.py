"""Split samples into a training and a held-out half: a pure function."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import InputError
from carryon.cache.store.view import StoreLike


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """The two halves of a store's samples; no sample is in both."""

    train: NDArray[np.int64]
    """Indices of the samples to train on."""
    held_out: NDArray[np.int64]
    """Indices of the samples to evaluate on."""


def split_samples(marked: NDArray[np.uint8], *, share: float, seed: int, digest: str) -> Split:
    """Return the split that the store marks, or a seeded one if it marks none.

    Args:
        marked: [S] 1 where the store marks a sample as held out.
        share: fraction of samples to hold out if none is marked; at least one sample is.
        seed: of the choice.
        digest: of the samples; stores of equal size are then split differently.

    Raises:
        InputError: one of the halves would be empty.
    """
    is_held_out = marked.astype(bool)
    if not is_held_out.any() and len(marked) > 1:
        random = np.random.default_rng([seed, int(digest[:16], 16)])
        number = min(len(marked) - 1, max(1, round(share * len(marked))))
        is_held_out[random.permutation(len(marked))[:number]] = True
    if is_held_out.all() or not is_held_out.any():
        raise InputError(
            f"the store has {len(marked)} samples, {int(is_held_out.sum())} of them held out: "
            "expected at least one to train on and one to evaluate on"
        )
    return Split(train=np.flatnonzero(~is_held_out), held_out=np.flatnonzero(is_held_out))


def sample_units(store: StoreLike) -> NDArray[np.int64]:
    """Return the unit of each sample, [S]."""
    return np.asarray(store.sample_starts // store.unit_tokens, dtype=np.int64)
