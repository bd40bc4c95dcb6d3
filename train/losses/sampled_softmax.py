"""Sampled softmax: the tokens that matter to a step, and a few others in place of all the rest.

A corpus uses a small part of a vocabulary, 2,000 to 12,000 of 49,152 tokens in a million
characters, most of them rarely, while the head costs a small carry-on most of its step. So a step
multiplies the rows of the store's most frequent tokens and of the step's own targets, and of all
others some that are drawn anew, each standing for (number of others) / (number drawn) of them.
Given the targets, the sum of exponentials is right on average (importance sampling, Jean et al.
2015, arXiv 1412.2007, with a uniform proposal beside rows that are always there), and as those hold
nearly all of the probability, it is close at every step.

For training only: held-out losses are always of the whole vocabulary.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.store.view import StoreLike
from carryon.train.config import LossSettings
from carryon.train.losses.frozen_head import FrequentRows, FrozenHead, HeadBlock, place_head

MOST_FREQUENT = 4096
"""Tokens whose rows are multiplied at every step, at most."""


def place_training_head(
    store: StoreLike, settings: LossSettings, *, device: torch.device
) -> FrozenHead:
    """Return a store's head where `settings` want it, and with the rows that they train against."""
    head = place_head(store, settings, device=device)
    if settings.sampled_softmax == 0:
        return head
    counts = count_tokens(store, vocab_size=head.vocab_size)
    return with_sampled_softmax(head, counts, settings.sampled_softmax)


def with_sampled_softmax(head: FrozenHead, counts: NDArray[np.int64], number: int) -> FrozenHead:
    """Return `head` with the rows that steps multiply; as it is where nothing would be saved.

    Args:
        head: the whole one.
        counts: [V], how often each token stands in the data; the most frequent are multiplied at
            every step.
        number: of the others, how many are drawn for a step; 0: none, the head stays whole.
    """
    order = np.argsort(-counts, kind="stable")[:MOST_FREQUENT]
    is_frequent = torch.zeros(head.vocab_size, dtype=torch.bool)
    is_frequent[torch.from_numpy(order[counts[order] > 0])] = True
    others = torch.nonzero(~is_frequent)[:, 0]
    if number == 0 or not bool(is_frequent.any()) or len(others) <= number:
        return head
    blocks = _blocks(head, torch.nonzero(is_frequent)[:, 0], first=0)
    frequent = FrequentRows(blocks=blocks, is_one=is_frequent, others=others, number=number)
    return replace(head, frequent=frequent)


def sampled_head(head: FrozenHead, targets_M: Tensor) -> FrozenHead:
    """Return the rows of one step, drawn by torch's own generator; a whole head as it is.

    Args:
        head: with the frequent rows, or whole.
        targets_M: [M], the tokens that the step's positions say next.
    """
    frequent = head.frequent
    if frequent is None:
        return head
    rare = torch.unique(targets_M.cpu().long())
    rare = rare[~frequent.is_one[rare]]
    drawn = frequent.others[torch.randint(len(frequent.others), (frequent.number,))]
    drawn = drawn[~torch.isin(drawn, rare)]  # they stand for the rest, of which these are not
    a_row = (len(frequent.others) - len(rare)) / max(1, len(drawn))
    first = frequent.num_rows
    blocks = _blocks(head, rare, first=first)
    blocks += _blocks(head, drawn, first=first + len(rare), log_weight=math.log(max(1.0, a_row)))
    return replace(head, frequent=None, parts=(*frequent.blocks, *blocks))


def count_tokens(store: StoreLike, *, vocab_size: int) -> NDArray[np.int64]:
    """Return how often each token of the vocabulary stands in a store, [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for unit in range(store.num_units):
        counts += np.bincount(store.read_unit(unit, taps=[]).tokens, minlength=vocab_size)
    return counts


def _blocks(
    head: FrozenHead, ids: Tensor, *, first: int, log_weight: float = 0.0
) -> tuple[HeadBlock, ...]:
    """Return the rows of tokens on the device, in blocks, numbered from `first`."""
    blocks = []
    for start in range(0, len(ids), head.block_rows):
        some = ids[start : start + head.block_rows]
        blocks.append(
            HeadBlock(
                first=first + start,
                weight=head.rows(some),
                bias=None if head.bias is None else head.bias[some.to(head.device)],
                log_weight=log_weight,
            )
        )
    return tuple(blocks)
