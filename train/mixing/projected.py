"""Projections of all sources at all supervised positions of a store, in memory.

Computed once for a pair of stores, from units of both, and cached on disk (projection_cache.py).
Letters: P supervised positions of the store, M those of a batch, S sources, F features, V
vocabulary of the anchor.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.device import to_device
from carryon.cache.progress import track
from carryon.cache.store.view import StoreLike
from carryon.train.config import LossSettings, StreamSettings
from carryon.train.data.batch import Batch
from carryon.train.data.loader import Stream
from carryon.train.data.sampler import count_steps, plan_pass
from carryon.train.data.split import sample_units
from carryon.train.losses.base_states import BaseStates
from carryon.train.losses.frozen_head import FrozenHead, frozen_head
from carryon.train.mixing.aligned_states import AlignedStates
from carryon.train.mixing.logits import log_probabilities
from carryon.train.mixing.projection import (
    FEATURES,
    Heads,
    ProjectedTargets,
    positions_at_once,
    project_targets,
)
from carryon.train.mixing.projection_cache import cached_projection, projection_key
from carryon.train.mixing.sources import Source

logger = logging.getLogger(__name__)
_BATCH_TOKENS = 4096
_ITSELF = "itself"
"""In the key of the anchor's own log-probabilities, in place of a map's digest."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairProjections:
    """Projections at the supervised pairs of a batch, on its device."""

    log_probs: Tensor
    """[M, S] of the targets."""
    features: Tensor
    """[M, S, F]."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ProjectedSources:
    """What the mixture reads of its sources."""

    sources: Sequence[Source]
    starts: NDArray[np.int64]
    """[samples] first row of each sample."""
    rows: NDArray[np.int64]
    """[P] rows of the supervised positions, ascending."""
    anchor: Tensor
    """[P] log-probabilities of the targets by the anchor alone, float32, on the host."""
    log_probs: Tensor
    """[P, S] by each source, float32, on the host."""
    features: Tensor
    """[P, S, F] float32, on the host."""
    token_bytes: Tensor
    """[V] int64: bytes of each token of the anchor, 0 for those that stand for no text."""

    @property
    def names(self) -> list[str]:
        """Name of each source."""
        return [source.name for source in self.sources]

    def at_pairs(self, batch: Batch, *, device: torch.device) -> PairProjections:
        """Return the projections at a batch of this store, on `device`."""
        at = torch.from_numpy(np.searchsorted(self.rows, rows_of(batch, self.starts)))
        parts = (to_device(values[at], device) for values in (self.log_probs, self.features))
        log_probs, features = parts
        return PairProjections(log_probs=log_probs, features=features)

    def of_samples(self, samples: NDArray[np.int64], lengths: NDArray[np.int32]) -> Tensor:
        """Return which positions belong to some samples, [P] bool.

        Args:
            samples: indices, any order.
            lengths: tokens of every sample of the store.
        """
        sample = np.searchsorted(self.starts, self.rows, side="right") - 1
        is_chosen = np.zeros(len(lengths), dtype=np.bool_)
        is_chosen[samples] = True
        return torch.from_numpy(is_chosen[sample])


def rows_of(batch: Batch, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the row of its store that each supervised pair of a batch lies at, [M]."""
    sample = batch.rows_of_pairs()
    first = np.cumsum(batch.lengths) - batch.lengths
    within: NDArray[np.int64] = batch.host.positions.cpu().numpy()
    rows: NDArray[np.int64] = (starts[batch.samples] - first)[sample] + within
    return rows


def project_sources(
    anchor: StoreLike,
    sources: Sequence[Source],
    *,
    base: BaseStates,
    stream: StreamSettings,
    loss: LossSettings,
    device: torch.device,
) -> ProjectedSources:
    """Return the projections of all sources, read from the cache or computed and cached.

    Args:
        anchor: the store that is trained on.
        sources: aligned to it, at least one.
        base: the anchor's own `final` states.
        stream: how the anchor is read.
        loss: where heads are placed.
        device: to compute on.

    Raises:
        DiskFullError: the cache cannot be written.
    """
    walk = _Walk(anchor, base=base, stream=stream, device=device)
    rows = np.sort(np.concatenate([np.zeros(0, np.int64), *_supervised_rows(anchor)]))
    own_head = _place(anchor, loss, device)

    def cached(
        store: StoreLike, digest: str, compute: Callable[[], ProjectedTargets]
    ) -> ProjectedTargets:
        key = projection_key(
            anchor_fingerprint=anchor.fingerprint,
            source_fingerprint=store.fingerprint,
            map_digest=digest,
            num_positions=len(rows),
            options={"states": "exact and stable"},
        )
        return cached_projection(key, compute)

    own = cached(anchor, _ITSELF, lambda: _own_targets(walk, own_head))
    found = [
        cached(
            source.store,
            source.vocabulary_map.digest(),
            lambda source=source: _project(walk, source, own, rows, own_head, loss),  # type: ignore[misc]
        )
        for source in sources
    ]
    return ProjectedSources(
        sources=list(sources),
        starts=anchor.sample_starts,
        rows=rows,
        anchor=own.log_probs,
        log_probs=torch.stack([each.log_probs for each in found], dim=1),
        features=torch.stack([each.features for each in found], dim=1),
        token_bytes=token_bytes(sources),
    )


def token_bytes(sources: Sequence[Source]) -> Tensor:
    """Return the bytes of each token of the anchor, [V] int64; 0 for those of no text."""
    words = sources[0].vocabulary_map.anchor
    return torch.tensor([len(word or b"") for word in words], dtype=torch.int64)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Positions:
    """Some supervised positions of one unit, ascending."""

    rows: NDArray[np.int64]
    states: Tensor
    """The anchor's, on the device."""
    targets: Tensor


class _Walk:
    """The anchor's store, read once for each time it is walked through."""

    def __init__(
        self, store: StoreLike, *, base: BaseStates, stream: StreamSettings, device: torch.device
    ) -> None:
        self.store, self._base, self._stream, self.device = store, base, stream, device

    def positions(self, head: FrozenHead, *, name: str) -> Iterator[_Positions]:
        """Yield all supervised positions, a part of a unit at a time."""
        store = self.store
        windows = plan_pass(
            np.arange(store.num_samples, dtype=np.int64),
            lengths=store.sample_lengths,
            units=sample_units(store),
            tokens_per_step=_BATCH_TOKENS,
        )
        taps = [self._base.tap]
        with Stream(store, windows, taps=taps, settings=self._stream, is_pinned=False) as steps:
            total = count_steps(windows)
            for batches in track(steps, total=total, name=name, unit="batch"):
                for batch in batches:  # of one unit, in stored order
                    if batch.num_targets:
                        moved = batch.to(self.device)
                        yield _Positions(
                            rows=rows_of(batch, store.sample_starts),
                            states=self._base.at_pairs(moved, head),
                            targets=moved.targets,
                        )


def _own_targets(walk: _Walk, head: FrozenHead) -> ProjectedTargets:
    """Return the anchor as a source of itself: its own log-probabilities and features."""
    size = positions_at_once(Heads(anchor=head, source=head))
    rows, log_probs, features = [], [], []
    for part in walk.positions(head, name="measure the base"):
        rows.append(part.rows)
        for start in range(0, len(part.rows), size):
            logs = log_probabilities(part.states[start : start + size], head)
            at = part.targets[start : start + size].unsqueeze(1)
            log_probs.append(logs.gather(1, at).squeeze(1).cpu())
            probabilities = logs.exp()
            entropy = -(probabilities * logs.clamp_min_(-1e4)).sum(dim=1)
            top = probabilities.amax(dim=1)
            columns = [entropy, top, torch.zeros_like(top), entropy, top]
            features.append(torch.stack(columns, dim=1).cpu())
    return _in_order(rows, log_probs, features)


def _project(
    walk: _Walk,
    source: Source,
    own: ProjectedTargets,
    all_rows: NDArray[np.int64],
    own_head: FrozenHead,
    loss: LossSettings,
) -> ProjectedTargets:
    """Return the projection of a source; where it knows nothing, the anchor's own numbers."""
    reader = AlignedStates(source.store, source.vocabulary_map)
    heads = Heads(anchor=own_head, source=_place(source.store, loss, walk.device))
    rows, log_probs, features = [], [], []
    num_unknown = num_unhealed = 0
    for part in walk.positions(own_head, name=f"project {source.name}"):
        states = reader.at(part.rows)
        at = np.searchsorted(all_rows, part.rows)
        logs, facts = own.log_probs[at].clone(), own.features[at].clone()
        known = torch.from_numpy(np.flatnonzero(states.is_known))
        if len(known):
            on_device = known.to(walk.device)
            projected = project_targets(
                exact_states=states.exact.to(walk.device),
                healing=states.healing,
                anchor_states=part.states[on_device],
                heads=heads,
                vocabulary_map=source.vocabulary_map,
                targets=part.targets[on_device],
            )
            logs[known], facts[known] = projected.log_probs, projected.features
        rows.append(part.rows)
        log_probs.append(logs)
        features.append(facts)
        num_unknown += len(part.rows) - len(known)
        num_unhealed += states.num_unhealed
    logger.info(
        f"{source.name}: projected at {len(all_rows) - num_unknown:,} of {len(all_rows):,} "
        f"targets, {num_unhealed:,} of them not healed; at the others it has read nothing, and "
        "the base's own distribution stands for it"
    )
    return _in_order(rows, log_probs, features)


def _in_order(
    rows: Sequence[NDArray[np.int64]], log_probs: Sequence[Tensor], features: Sequence[Tensor]
) -> ProjectedTargets:
    order = torch.from_numpy(np.argsort(np.concatenate([np.zeros(0, np.int64), *rows])))
    empty = torch.zeros(0)
    return ProjectedTargets(
        log_probs=torch.cat([*log_probs, empty])[order],
        features=torch.cat([*features, empty.reshape(0, len(FEATURES))])[order],
    )


def _supervised_rows(store: StoreLike) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of a unit whose next token is a target of the same sample."""
    for unit in store.iter_units(taps=[]):
        is_target = unit.loss_mask == 1
        is_target[unit.starts] = False
        inside = np.zeros(len(is_target), dtype=np.bool_)
        for start, length in zip(unit.starts, unit.lengths, strict=True):
            inside[start : start + length] = True
        yield unit.unit * store.unit_tokens + np.flatnonzero(is_target & inside) - 1


def _place(store: StoreLike, loss: LossSettings, device: torch.device) -> FrozenHead:
    """Return a head in the type of its store, which `log_probabilities` widens."""
    head = store.head(is_mapped=loss.head_place == "mapped")
    dtype = torch.bfloat16 if head.weight.dtype == np.uint16 else torch.float32
    is_resident = loss.head_place == "device"
    return frozen_head(head, device=device, dtype=dtype, is_resident=is_resident)
