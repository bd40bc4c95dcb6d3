"""Draw a token of each row from a distribution over a large vocabulary, by its inverse.

Letters: B rows, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from carryon.cache.errors import InputError

BLOCK = 512
"""Probabilities that are summed first: one running sum of all would lose the small ones."""


def sampling_processors(*, temperature: float, top_p: float) -> Any:  # noqa: ANN401
    """Return what makes greedy generation of transformers sample, with torch's default generator.

    Its own sampling draws a random number for every entry of the vocabulary, which takes a CPU a
    third of the time of a small base.
    """
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return LogitsProcessorList([*processors, _draw])


def _draw(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Return logits [B, V] that leave only the token drawn from `scores` [B, V].

    Raises:
        InputError: a logit is no number, or infinite.
    """
    uniform = torch.rand(len(scores), device=scores.device, dtype=torch.float32)
    probabilities = torch.softmax(scores.float(), dim=1)
    if probabilities[:, 0].isnan().any():  # one such logit makes the whole row NaN
        raise InputError(
            "logits: expected numbers, got NaN or infinity, from which no token can be drawn. "
            "Fix: --compute-dtype float32, or another base or carry-on"
        )
    tokens = sample_tokens(probabilities, uniform)
    return torch.full_like(scores, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0.0)


def sample_tokens(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return the token at which the running sum of each row first exceeds its `uniform`.

    Args:
        probabilities: [B, V] float32, not negative; the sum of a row need not be 1.
        uniform: [B] float32, at least 0 and less than 1.

    Returns:
        [B] int64, tokens of a probability above 0.
    """
    rows, vocabulary = probabilities.shape
    padded = nn.functional.pad(probabilities, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    sums = padded.sum(dim=2).cumsum(dim=1)  # [B, blocks]
    aim = uniform.unsqueeze(1) * sums[:, -1:]
    block = torch.searchsorted(sums, aim, right=True)
    # Rounding may lead behind the last one: then the last whose sum is above 0.
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    block = torch.minimum(block, last)  # [B, 1]
    before = nn.functional.pad(sums, (1, 0)).gather(1, block)
    within = padded.gather(1, block.unsqueeze(2).expand(-1, -1, BLOCK)).squeeze(1).cumsum(dim=1)
    place = torch.searchsorted(within, aim - before, right=True)
    last = torch.searchsorted(within, within[:, -1:].contiguous())
    return (block * BLOCK + torch.minimum(place, last)).squeeze(1)
