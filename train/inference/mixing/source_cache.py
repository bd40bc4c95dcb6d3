"""Keys and values of a source for the rows of a batch, whose texts are cropped apart.

A row that is cropped leaves slots without a token among those of other rows. What each token sees
is decided by positions, as over the trees of aligned extraction, so such slots cost room only, and
are taken out when they are many. Letters: B rows, S slots, L new tokens, D width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Cache, DynamicCache

from carryon.cache.base.model import Base
from carryon.cache.device import attention_of_any_shape
from carryon.cache.extraction.aligned_forward import attention_inputs

CHUNK_TOKENS = 512
"""New tokens of a row in one forward pass: of a long prompt a mask of all would be large."""
_UNUSED = -1
_MOST_UNUSED, _LEAST_UNUSED = 1.25, 32
"""Slots for each token of the longest row, and further ones, from which unused are taken out."""


class SourceCache:
    """Keys and values of the rows of a batch."""

    def __init__(self, base: Base, *, num_rows: int) -> None:
        """Start without a token."""
        self._base = base
        self._cache: Cache = _new_cache()
        self._places: NDArray[np.int64] = np.zeros((num_rows, 0), dtype=np.int64)  # [B, S]

    @property
    def num_slots(self) -> int:
        """S."""
        return int(self._places.shape[1])

    def run(self, num_kept: Sequence[int], new: Sequence[Sequence[int]]) -> list[Tensor]:
        """Crop each row, run its new tokens, and return their `final` states, [L, D] each.

        Args:
            num_kept: tokens of each row that stay.
            new: tokens of each row behind them.
        """
        self._crop(np.array(num_kept, dtype=np.int64))
        states: list[list[Tensor]] = [[] for _ in new]
        longest = max(map(len, new), default=0)
        for first in range(0, longest, CHUNK_TOKENS):
            part = [row[first : first + CHUNK_TOKENS] for row in new]
            found = self._run([kept + first for kept in num_kept], part)
            for own, made, tokens in zip(states, found, part, strict=True):
                own.append(made[: len(tokens)])
        empty = torch.zeros(0, self._base.identity.width, device=self._base.device)
        return [torch.cat(own) if own else empty for own in states]

    def select(self, rows: Sequence[int]) -> None:
        """Keep some rows, in this order; one may be there several times."""
        self._places = self._places[list(rows)]
        if len(self._cache.layers):
            index = torch.tensor(rows, dtype=torch.int64, device=self._base.device)
            self._cache.batch_select_indices(index)

    def _run(self, starts: Sequence[int], new: Sequence[Sequence[int]]) -> Tensor:
        """Return states [B, L, D]; those behind a row's own tokens mean nothing."""
        longest = max(map(len, new))
        ids = np.zeros((len(new), longest), dtype=np.int64)
        places = np.zeros_like(ids)
        is_used = np.zeros(ids.shape, dtype=np.bool_)
        for row, (start, tokens) in enumerate(zip(starts, new, strict=True)):
            ids[row, : len(tokens)] = tokens
            places[row, : len(tokens)] = np.arange(start, start + len(tokens))
            is_used[row, : len(tokens)] = True
        keys = np.concatenate([self._places, np.where(is_used, places, _UNUSED)], axis=1)
        if bool((keys >= 0).all()):  # in order, so the base's own mask is that of its positions
            inputs: dict[str, Any] = {"position_ids": torch.from_numpy(places)}
            inputs["position_ids"] = inputs["position_ids"].to(self._base.device)
        else:
            seen = (keys[:, None, :] >= 0) & (keys[:, None, :] <= places[:, :, None])
            new_slots = np.arange(longest)
            seen[:, new_slots, self.num_slots + new_slots] = True  # a pad sees itself
            inputs = attention_inputs(self._base, seen, places, keys)
        self._places = keys
        decoder: Any = self._base.architecture.decoder
        with torch.no_grad(), attention_of_any_shape():
            output = decoder(
                input_ids=torch.from_numpy(ids).to(self._base.device),
                past_key_values=self._cache,
                use_cache=True,
                **inputs,
            )
        states: Tensor = output.last_hidden_state
        return states

    def _crop(self, num_kept: NDArray[np.int64]) -> None:
        """Give up the slots of tokens that do not stay."""
        places = np.where(self._places < num_kept[:, None], self._places, _UNUSED)
        used = np.flatnonzero((places >= 0).any(axis=0))
        num_slots = int(used[-1]) + 1 if len(used) else 0
        if num_slots < self.num_slots:
            self._keep_slots(slice(0, num_slots))
        self._places = places[:, :num_slots]
        longest = int(num_kept.max(initial=0))
        if num_slots > _MOST_UNUSED * longest + _LEAST_UNUSED:
            self._compact(longest)

    def _compact(self, longest: int) -> None:
        """Move each row's tokens to its first slots."""
        order = np.argsort(np.where(self._places >= 0, self._places, self.num_slots), axis=1)
        order = order[:, :longest]
        self._places = np.take_along_axis(self._places, order, axis=1)
        index = torch.from_numpy(order).to(self._base.device)
        rows = torch.arange(len(order), device=self._base.device)[:, None]
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                kept = getattr(layer, name).transpose(1, 2)[rows, index]  # [B, longest, heads, *]
                setattr(layer, name, kept.transpose(1, 2).contiguous())

    def _keep_slots(self, slots: slice) -> None:
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                setattr(layer, name, getattr(layer, name)[:, :, slots])


def _new_cache() -> Cache:
    """Return a cache that keeps every token, also of layers with a window: the mask has it."""
    make: Any = DynamicCache
    cache: Cache = make()
    return cache
