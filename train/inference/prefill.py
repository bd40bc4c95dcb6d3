"""What prompts of a batch have in common is computed once.

Letters: B prompts, P tokens that all of them begin with, T positions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

LEAST_COMMON = 8
"""Common tokens below which a pass of their own is not worth its start."""


def common_length(rows: Sequence[Sequence[int]]) -> int:
    """Return P, less than the length of every row: each keeps a token to go on from."""
    first, last = min(map(list, rows)), max(map(list, rows))
    room = min(map(len, rows)) - 1
    pairs = zip(first[:room], last[:room], strict=True)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), room)


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Return rows as one [B, T] int64 tensor, the shorter ones behind `pad`."""
    return pad_sequence(
        [torch.tensor(row) for row in rows],
        batch_first=True,
        padding_value=pad,
        padding_side="left",
    )


def arrange(rows: Sequence[Sequence[int]], *, common: int, pad: int) -> tuple[Tensor, Tensor]:
    """Return [B, T] token ids and their mask: what is common, padding, what is each row's own."""
    tokens = pad_left([row[common:] for row in rows], pad)
    mask = pad_left([[1] * (len(row) - common) for row in rows], 0)
    shared = torch.tensor(rows[0][:common], dtype=torch.int64).expand(len(rows), -1)
    return torch.cat([shared, tokens], 1), torch.cat([torch.ones_like(shared), mask], 1)


def prefill(
    rows: Sequence[Sequence[int]],
    *,
    pad: int,
    read: Callable[[Tensor, Tensor, Any], Any],
    can_share: Callable[[Any], bool],
) -> tuple[Tensor, Tensor, Any]:
    """Read what several rows share, once: the tokens they begin with, and equal rows.

    Args:
        rows: token ids of prompts.
        pad: id for padding.
        read: (tokens [b, t], mask [b, t], cache) -> the cache behind those tokens.
        can_share: whether rows of that cache can be chosen and repeated, and padding behind its
            positions changes nothing.

    Returns:
        [B, T] int64 token ids, their [B, T] mask, and a cache of some of the first positions, less
        than T, or None.
    """
    common = common_length(rows) if len(rows) > 1 else 0
    common = common if common >= LEAST_COMMON else 0
    tokens, mask = arrange(rows, common=common, pad=pad)
    cache: Any = None
    if common:
        cache = read(tokens[:1, :common], mask[:1, :common], None)
        if not can_share(cache):
            return *arrange(rows, common=0, pad=pad), None
    places = dict[tuple[int, ...], int]()
    index = torch.tensor([places.setdefault(tuple(row), len(places)) for row in rows])
    if len(places) == len(rows):
        if cache is not None:
            cache.batch_select_indices(torch.zeros_like(index))
        return tokens, mask, cache
    first = torch.tensor([index.tolist().index(place) for place in range(len(places))])
    # A row with one token of its own would be padding up to the end of what is read here.
    if min(map(len, rows)) > common + 1:
        if cache is not None:
            cache.batch_select_indices(torch.zeros_like(first))
        cache = read(tokens[first, :-1], mask[first, :-1], cache)
        if not can_share(cache):
            return *arrange(rows, common=0, pad=pad), None
        cache.batch_select_indices(index)
    elif cache is not None:
        cache.batch_select_indices(torch.zeros_like(index))
    return tokens, mask, cache
