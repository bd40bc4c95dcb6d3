"""Sampled softmax: the tokens that the data holds, and a few others in place of all the rest.

A corpus uses a small part of a vocabulary, 2,000 to 7,000 of 49,152 tokens in a million characters,
while the head costs a small carry-on most of its step. So the rows of the tokens that stand in the
store are multiplied at every step, and of the others some that are drawn anew, each standing for
(number of others) / (number drawn) of them. The sum of exponentials is then right on average
(importance sampling, Jean et al. 2015, arXiv 1412.2007, with a uniform proposal beside the known
tokens), and as the known tokens hold nearly all of the probability, it is close at every step.

For training only: held-out losses are always of the whole vocabulary.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.reader import Store
from carryon.train.config import LossSettings
from carryon.train.frozen_head import FrozenHead, HeadBlock, KnownRows, place_head


def place_training_head(
    store: Store, settings: LossSettings, *, device: torch.device
) -> FrozenHead:
    """Return a store's head where `settings` want it, and with the rows that they train against."""
    head = place_head(store, settings, device=device)
    if settings.sampled_softmax == 0:
        return head
    known = tokens_of(store, vocab_size=head.vocab_size)
    return with_sampled_softmax(head, known, settings.sampled_softmax)


def with_sampled_softmax(head: FrozenHead, known: NDArray[np.bool_], number: int) -> FrozenHead:
    """Return `head` with the rows that a step multiplies; as it is where nothing would be saved.

    Args:
        head: the whole one.
        known: [V], the tokens whose rows are always multiplied; every target must be among them.
        number: of the others, how many are drawn; 0: as it is.
    """
    ids = torch.from_numpy(np.flatnonzero(known))
    others = torch.from_numpy(np.flatnonzero(~known))
    if number == 0 or len(ids) == 0 or len(others) <= number:
        return head
    blocks = _blocks(head, ids, first=0)
    return replace(head, known=KnownRows(blocks=blocks, others=others, number=number))


def sampled_head(head: FrozenHead) -> FrozenHead:
    """Return the rows of one step, drawn by torch's own generator; a whole head as it is."""
    known = head.known
    if known is None:
        return head
    drawn = known.others[torch.randint(len(known.others), (known.number,))]
    blocks = _blocks(
        head, drawn, first=known.num_rows, log_weight=math.log(len(known.others) / known.number)
    )
    return replace(head, known=None, parts=(*known.blocks, *blocks))


def tokens_of(store: Store, *, vocab_size: int) -> NDArray[np.bool_]:
    """Return which tokens of the vocabulary stand in a store, [V]."""
    found = np.zeros(vocab_size, dtype=np.bool_)
    for unit in range(store.num_units):
        found[store.read_unit(unit, taps=[]).tokens] = True
    return found


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
