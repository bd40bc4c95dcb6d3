"""Sampled softmax: probable tokens, the targets, and sampled negatives, reweighted.

A corpus uses few tokens of a vocabulary: 2,000 to 12,000 of 49,152 in a million characters, most of
them rarely. The head costs a small carry-on most of its step. So a step multiplies the rows of the
tokens with the largest scores (token_scores.py), of its own targets, and of some of the others.
These are cut into strata by score. What is sampled of a stratum, uniformly and without replacement,
stands for all of it: a proposal close to the scores, without a weight for each row.

Given the targets, the sum of exponentials and its gradient are unbiased (importance sampling, Jean
et al. 2015, arXiv 1412.2007). Its logarithm, and so the gradient that trains, is a ratio of
estimates, whose bias shrinks with the number of negatives.

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
from carryon.train.losses.token_scores import score_tokens

MOST_FREQUENT = 4096
"""Maximum number of tokens in every step; never more than a quarter of the vocabulary."""
STRATA = (1, 4, 16)
"""Sizes of the strata of the others, from the largest scores, in proportion. Each gives as many
negatives as the next."""
_LEAST = 8
"""Negatives of each; with fewer there is one stratum."""


def place_training_head(
    store: StoreLike, settings: LossSettings, *, device: torch.device
) -> FrozenHead:
    """Return a store's head placed as `settings` say, with the rows that steps train against."""
    head = place_head(store, settings, device=device)
    if settings.sampled_softmax == 0:
        return head
    return with_sampled_softmax(head, score_tokens(store, head), settings.sampled_softmax)


def most_frequent(vocab_size: int) -> int:
    """Return how many tokens are in every step, at most."""
    return min(MOST_FREQUENT, vocab_size // 4)


def with_sampled_softmax(
    head: FrozenHead, scores: NDArray[np.int64] | NDArray[np.float64], num_sampled: int
) -> FrozenHead:
    """Return `head` with the rows that steps multiply; unchanged if that would save nothing.

    Args:
        head: the whole one.
        scores: [V], 0 or more: how often a token occurs, or how probable it is.
        num_sampled: tokens to sample for a step, besides those with the largest scores. 0: no
            sampling.
    """
    order = np.argsort(-scores, kind="stable")
    most = most_frequent(head.vocab_size)
    num_frequent = int((scores[order[:most]] > 0).sum())
    others = torch.from_numpy(order[num_frequent:])
    if num_sampled == 0 or num_frequent == 0 or len(others) <= num_sampled:
        return head
    is_graded = np.median(scores) > 0 and num_sampled >= _LEAST * len(STRATA)
    is_frequent = torch.ones(head.vocab_size, dtype=torch.bool)
    is_frequent[others] = False
    frequent = FrequentRows(
        blocks=_blocks(head, torch.nonzero(is_frequent)[:, 0], first=0),
        is_frequent=is_frequent,
        strata=_cut(others) if is_graded else (others,),
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
    is_given = frequent.is_frequent.clone()
    is_given[rare] = True
    first = sum(len(block.weight) for block in frequent.blocks)
    parts = [*frequent.blocks, *_blocks(head, rare, first=first)]
    first += len(rare)
    for stratum, count in zip(frequent.strata, frequent.counts(), strict=True):
        others = stratum[~is_given[stratum]]
        sampled = others[torch.randperm(len(others))[:count]]
        if len(sampled):
            log_weight = math.log(len(others) / len(sampled))
            parts += _blocks(head, sampled, first=first, log_weight=log_weight)
            first += len(sampled)
    return replace(head, frequent=None, parts=tuple(parts))


def _cut(others: Tensor) -> tuple[Tensor, ...]:
    """Return token ids in the order of their scores, cut into strata."""
    bounds = np.cumsum(STRATA)[:-1] * len(others) // sum(STRATA)
    return torch.tensor_split(others, bounds.tolist())


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
