"""How often tokens occur in a store, and how probable its base finds them on average.

A sampled softmax keeps the tokens with the largest scores (sampled_softmax.py). Occurrences alone
miss tokens that a base finds probable and that do not occur in a small corpus; most of what sampled
tokens have to stand for is theirs (`bench train.proposals`).
Letters: P positions, D base width, V vocabulary.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.device import to_device
from carryon.cache.store.view import StoreLike
from carryon.train.losses.block_softmax import block_logits
from carryon.train.losses.frozen_head import FrozenHead

_SAMPLES, _POSITIONS = 64, 4
"""Samples whose positions stand for the store, and positions of each. With half as many the error
of the gradient is the same."""


def score_tokens(store: StoreLike, head: FrozenHead) -> NDArray[np.float64]:
    """Return the share of each token among all of a store, plus its mean probability, [V].

    The probabilities are the base's at a few positions all over the store; they are left out where
    the store has neither `final` nor `prenorm` states. Deterministic.
    """
    counts = count_tokens(store, vocab_size=head.vocab_size)
    scores: NDArray[np.float64] = counts / max(1, counts.sum())
    states = _final_states(store)
    return scores if states is None else scores + mean_probabilities(states, head)


def count_tokens(store: StoreLike, *, vocab_size: int) -> NDArray[np.int64]:
    """Return the occurrences of each token of the vocabulary in a store, [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for unit in range(store.num_units):
        counts += np.bincount(store.read_unit(unit, taps=[]).tokens, minlength=vocab_size)
    return counts


@torch.no_grad()
def mean_probabilities(states_PD: Tensor, head: FrozenHead) -> NDArray[np.float64]:
    """Return the mean probability of each token after some states, [V]; [P, V] is never held."""
    states = to_device(states_PD, head.device).to(head.dtype)
    log_sums = torch.full((len(states),), -torch.inf, device=head.device)
    for block in head.blocks():
        logits, _ = block_logits(states, block, head, with_slopes=False)
        torch.logaddexp(log_sums, logits.logsumexp(dim=1), out=log_sums)
    means = []
    for block in head.blocks():
        logits, _ = block_logits(states, block, head, with_slopes=False)
        means.append(logits.sub_(log_sums.unsqueeze(1)).exp_().mean(dim=0))
    return torch.cat(means).cpu().numpy().astype(np.float64)


def _final_states(store: StoreLike) -> Tensor | None:
    """Return states before the head at positions whose next tokens are targets, [P, D] float32."""
    tap = next((each for each in ("final", "prenorm") if each in store.taps), None)
    if tap is None:
        return None
    chosen = np.linspace(0, store.num_samples - 1, min(store.num_samples, _SAMPLES))
    found = []
    for sample in chosen.astype(np.int64).tolist():
        read = store.read_sample(sample, taps=[tap])
        places = np.flatnonzero(read.loss_mask[1:])
        spread = np.linspace(0, len(places) - 1, min(len(places), _POSITIONS))
        found.append(read.float32(tap)[places[spread.astype(np.int64)]])
    states = np.concatenate(found)
    if not len(states):
        return None
    return torch.from_numpy(states if tap == "final" else store.head().norm.apply(states))
