"""Error of the sampled softmax's gradient by where its negatives come from.

One step's targets of a real store, with the base's states: the gradient of the exact loss, and
those of several draws. `uniform`, `unigram` and `log_uniform` keep the tokens that occur in the
store and sample from the others, each row with its own weight. `scored_uniform` keeps the tokens
with the largest scores instead; `scored` is what training does, in strata.
Letters: M targets, D width, V vocabulary, n tokens that are not kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.cache.store.reader import Store
from carryon.tools.bench.job import Job
from carryon.train.config import LossSettings
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import FrozenHead, HeadBlock, place_head
from carryon.train.losses.sampled_softmax import sampled_head, with_sampled_softmax
from carryon.train.losses.token_scores import count_tokens, score_tokens

CORPORA = ("gsm", "pydoc", "manpages")
_CHUNK = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Targets of a step."""

    states: Tensor
    """[M, D] float32."""
    targets: Tensor
    """[M] int64."""

    def gradient(self, head: FrozenHead) -> Tensor:
        """Return the gradient of the summed losses to the states, [M, D]."""
        states = self.states.clone().requires_grad_()
        losses = token_losses(states, self.targets, head=head, chunk=_CHUNK)
        [gradient] = torch.autograd.grad(losses.sum(), states)
        return gradient


def measure_proposals(
    job: Job, *, sampled: int = 2048, targets: int = 512, draws: int = 24
) -> None:
    """Report the error of the gradient by proposal, for each store.

    Args:
        job: input.
        sampled: negatives of a draw.
        targets: of the step.
        draws: whose errors are averaged.
    """
    for label, store in job.open_stores(CORPORA).items():
        head = place_head(store, LossSettings(), device=torch.device("cpu"))
        if head.softcap is not None:
            raise InputError(
                f"{store.root}: expected a head without a soft cap, got {head.softcap}"
            )
        step = _read_step(store, targets)
        exact = step.gradient(head)
        for name, draw in _proposals(store, head, sampled).items():
            torch.manual_seed(0)
            heads = [draw(step.targets) for _ in range(draws)]
            errors = torch.stack([step.gradient(each) for each in heads]) - exact
            summed = errors.sum(dim=1).norm(dim=1).square().mean().sqrt()
            job.report(
                f"proposal.{label}.{name}",
                float(errors.square().sum() / draws) ** 0.5 / float(exact.norm()),
                "error of the gradient, of its norm",
                summed=float(summed / exact.sum(dim=0).norm()),
                bias=_bias(errors) / float(exact.norm()),
                rows=int(
                    np.mean([sum(len(part.weight) for part in each.blocks()) for each in heads])
                ),
            )


def _bias(errors: Tensor) -> float:
    """Return the norm of the mean of errors [draws, M, D], less what their noise adds."""
    noise = float(errors.var(dim=0).sum()) / len(errors)
    return math.sqrt(max(0.0, float(errors.mean(dim=0).square().sum()) - noise))


def _proposals(
    store: Store, head: FrozenHead, sampled: int
) -> dict[str, Callable[[Tensor], FrozenHead]]:
    """Return functions of targets that draw the rows of a step."""
    counts = count_tokens(store, vocab_size=head.vocab_size)
    occurring = with_sampled_softmax(head, counts, sampled)
    scored = with_sampled_softmax(head, score_tokens(store, head), sampled)
    if occurring.frequent is None or scored.frequent is None:
        raise InputError(f"sampled: expected less than most of {head.vocab_size}, got {sampled}")
    others = torch.cat(occurring.frequent.strata).numpy()
    ranks = np.arange(len(others)) + head.vocab_size - len(others) + 1.0  # as they are ordered
    weights = {
        "uniform": np.ones(len(others)),
        "unigram": counts[others] + 1.0,
        "log_uniform": np.log1p(1 / ranks),
    }
    one = replace(scored.frequent, strata=(torch.cat(scored.frequent.strata),))
    return {
        name: lambda targets, weight=weight: _draw(occurring, others, weight, targets)
        for name, weight in weights.items()
    } | {
        "scored_uniform": lambda targets: sampled_head(replace(scored, frequent=one), targets),
        "scored": lambda targets: sampled_head(scored, targets),
    }


def _draw(
    head: FrozenHead, others: NDArray[np.int64], weights: NDArray[np.float64], targets: Tensor
) -> FrozenHead:
    """Return the rows of a step, sampled in proportion to `weights` [n] with replacement."""
    assert head.frequent is not None
    given = np.unique(targets.numpy())
    rare = given[~head.frequent.is_frequent.numpy()[given]]
    is_left = ~np.isin(others, rare)
    share = torch.from_numpy(weights[is_left] / weights[is_left].sum())
    drawn = torch.multinomial(share, head.frequent.num_sampled, replacement=True)
    parts = list(head.frequent.blocks)
    first = sum(len(part.weight) for part in parts)
    for ids, log_weights in (
        (torch.from_numpy(rare), torch.zeros(len(rare))),
        (torch.from_numpy(others[is_left])[drawn], -(len(drawn) * share[drawn]).log().float()),
    ):
        if len(ids):
            bias = log_weights / head.logit_scale  # scaled with the logits
            bias = bias if head.bias is None else bias + head.bias[ids]
            parts.append(HeadBlock(first=first, weight=head.rows(ids), bias=bias))
            first += len(ids)
    return replace(head, frequent=None, parts=tuple(parts))


def _read_step(store: Store, targets: int) -> Step:
    """Return the first targets of the store's last samples."""
    states, tokens, left = [], [], targets
    for index in reversed(range(store.num_samples)):
        if left <= 0:
            break
        sample = store.read_sample(index, taps=["final"])
        places = np.flatnonzero(sample.loss_mask[1:])[:left]
        states.append(sample.float32("final")[places])
        tokens.append(sample.tokens[places + 1])
        left -= len(places)
    return Step(
        states=torch.from_numpy(np.concatenate(states)),
        targets=torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
    )
