"""Sampled softmax: frequent tokens, the targets, and uniformly sampled negatives, reweighted.

A corpus uses few tokens of a vocabulary: 2,000 to 12,000 of 49,152 in a million characters, most of
them rarely. The head costs a small carry-on most of its step. So a step multiplies the rows of the
store's most frequent tokens, of its own targets, and of some sampled others, each of which stands
for (number of others) / (number sampled) of them. Given the targets, the sum of exponentials is
unbiased (importance sampling, Jean et al. 2015, arXiv 1412.2007, with a uniform proposal). As the
frequent tokens hold nearly all of the probability, it is close at every step.

For training only: held-out losses always cover the whole vocabulary.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.device import to_device
from carryon.cache.store.view import StoreLike
from carryon.train.config import LossSettings
from carryon.train.losses.frozen_head import FrequentRows, FrozenHead, HeadBlock, place_head

MOST_FREQUENT = 4096
"""Maximum number of frequent tokens."""


def place_training_head(
    store: StoreLike, settings: LossSettings, *, device: torch.device
) -> FrozenHead:
    """Return a store's head placed as `settings` say, with the rows that steps train against."""
    head = place_head(store, settings, device=device)
    if settings.sampled_softmax == 0:
        return head
    counts = count_tokens(store, vocab_size=head.vocab_size)
    return with_sampled_softmax(head, counts, settings.sampled_softmax)


def with_sampled_softmax(
    head: FrozenHead, counts: NDArray[np.int64], num_sampled: int
) -> FrozenHead:
    """Return `head` with the rows that steps multiply; unchanged if that would save nothing.

    Args:
        head: the whole one.
        counts: [V], occurrences of each token in the data.
        num_sampled: tokens to sample for a step, besides the most frequent. 0: no sampling.
    """
    order = np.argsort(-counts, kind="stable")[:MOST_FREQUENT]
    is_frequent = torch.zeros(head.vocab_size, dtype=torch.bool)
    is_frequent[torch.from_numpy(order[counts[order] > 0])] = True
    others = torch.nonzero(~is_frequent)[:, 0]
    if num_sampled == 0 or not bool(is_frequent.any()) or len(others) <= num_sampled:
        return head
    frequent = FrequentRows(
        blocks=_blocks(head, torch.nonzero(is_frequent)[:, 0], first=0),
        is_frequent=is_frequent,
        others=others,
        num_sampled=num_sampled,
    )
    return replace(head, frequent=frequent)


def sampled_head(head: FrozenHead, targets_M: Tensor) -> FrozenHead:
    """Return the rows of one step, sampled by torch's global generator.

    Args:
        head: with frequent rows; a whole head is returned as it is.
        targets_M: [M], the target tokens of the step's positions. On the host: an accelerator
            would be waited for.
    """
    frequent = head.frequent
    if frequent is None:
        return head
    rare = torch.unique(targets_M.cpu().long())
    rare = rare[~frequent.is_frequent[rare]]
    sampled = frequent.others[torch.randint(len(frequent.others), (frequent.num_sampled,))]
    sampled = sampled[~torch.isin(sampled, rare)]  # they stand for the rest, without the targets
    weight = (len(frequent.others) - len(rare)) / max(1, len(sampled))
    first = sum(len(block.weight) for block in frequent.blocks)
    parts = frequent.blocks + _blocks(head, rare, first=first)
    parts += _blocks(head, sampled, first=first + len(rare), log_weight=math.log(max(1.0, weight)))
    return replace(head, frequent=None, parts=parts)


def count_tokens(store: StoreLike, *, vocab_size: int) -> NDArray[np.int64]:
    """Return the occurrences of each token of the vocabulary in a store, [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for unit in range(store.num_units):
        counts += np.bincount(store.read_unit(unit, taps=[]).tokens, minlength=vocab_size)
    return counts


def _blocks(
    head: FrozenHead, ids: Tensor, *, first: int, log_weight: float = 0.0
) -> tuple[HeadBlock, ...]:
    """Return the rows of tokens on the device, in blocks, indexed from `first`."""
    blocks = []
    for start in range(0, len(ids), head.block_rows):
        some = ids[start : start + head.block_rows]
        blocks.append(
            HeadBlock(
                first=first + start,
                weight=head.rows(some),
                bias=None if head.bias is None else head.bias[to_device(some, head.device)],
                log_weight=log_weight,
            )
        )
    return tuple(blocks)
