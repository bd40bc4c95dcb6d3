"""Projecting another base's distributions onto the anchor's vocabulary: positions a second.

Beside it the products with both heads alone, which no way of projecting can do without: where they
take nearly all of the time, only faster products help.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from carryon.cache.device import pick_device
from carryon.cache.errors import InputError
from carryon.cache.store.reader import Store
from carryon.tools.bench.job import Job, in_turn, split_label, timed
from carryon.train.losses.frozen_head import FrozenHead, frozen_head
from carryon.train.mixing.aligned_states import AlignedStates
from carryon.train.mixing.healing import HealingStates
from carryon.train.mixing.projection import Heads, positions_at_once, project_targets
from carryon.train.mixing.sources import Source, open_sources

LEAST_SPEED = 5000.0
"""Positions a second of one core."""


def measure_projection(job: Job, *, positions: int = 512, rounds: int = 3) -> None:
    """Project the first supervised positions of the anchor's store, as training does once.

    Raises:
        InputError: not two stores are given, or nothing in the first unit can be projected.
    """
    if len(job.given_stores) != 2:
        raise InputError(
            "--store: expected the anchor's store and one that is aligned to it, got "
            f"{len(job.given_stores)}. Fix: carryon extract --align-to, then --store A --store B"
        )
    anchor_path, aligned_path = (split_label(each)[1] for each in job.given_stores)
    anchor = Store.open(anchor_path)
    [source] = open_sources(anchor, [aligned_path])
    device = pick_device("auto")
    heads = Heads(anchor=_place(anchor, device), source=_place(source.store, device))
    given = _read(anchor, source, positions, device=device)
    project = partial(
        project_targets,
        exact_states=given.exact,
        healing=given.healing,
        anchor_states=given.anchor,
        heads=heads,
        vocabulary_map=source.vocabulary_map,
        targets=given.targets,
    )
    seconds = in_turn(
        {
            "all": timed(lambda: None if project() else None),
            "products": timed(lambda: _multiply(given, heads)),
        },
        rounds=rounds,
    )
    count = len(given.targets)
    job.report(
        "mixing.projection",
        count / seconds["all"],
        "positions/s, with the products of both heads",
        at_least=LEAST_SPEED,
        positions=count,
        healing_states=len(given.healing.rows),
        vocabularies=[heads.anchor.vocab_size, heads.source.vocab_size],
        products_alone=count / seconds["products"],
        share_of_products=seconds["products"] / seconds["all"],
        threads=torch.get_num_threads(),
        device=str(device),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Given:
    """What is projected, at n positions."""

    anchor: Tensor
    """[n, D_A] states."""
    exact: Tensor
    """[n, D_B]."""
    healing: HealingStates
    targets: Tensor
    """[n] int64."""


def _read(anchor: Store, source: Source, count: int, *, device: torch.device) -> _Given:
    """Return the first supervised positions that the source knows, from the first unit."""
    unit = anchor.read_unit(0)
    is_target = unit.loss_mask == 1
    is_target[unit.starts] = False
    rows = np.flatnonzero(is_target)[:count] - 1
    if not len(rows):
        raise InputError(f"{anchor.name}: expected supervised tokens in its first unit, got none")
    states = AlignedStates(source.store, source.vocabulary_map).at(rows)
    known = rows[states.is_known]
    if not len(known):
        raise InputError(f"{source.name}: expected states at the first positions, got none")
    return _Given(
        anchor=torch.from_numpy(unit.float32("final")[known]).to(device),
        exact=states.exact.to(device),
        healing=states.healing,
        targets=torch.from_numpy(unit.tokens[known + 1].astype(np.int64)).to(device),
    )


def _place(store: Store, device: torch.device) -> FrozenHead:
    head = store.head()
    dtype = torch.bfloat16 if head.weight.dtype == np.uint16 else torch.float32
    return frozen_head(head, device=device, dtype=dtype, is_resident=False)


def _multiply(given: _Given, heads: Heads) -> None:
    """Compute all logits, as many positions at once as a projection does, and nothing else."""
    size = positions_at_once(heads)
    pairs: Sequence[tuple[Tensor, FrozenHead]] = (
        (given.anchor, heads.anchor),
        (given.exact, heads.source),
        (given.healing.states.to(given.exact.device), heads.source),
    )
    for states, head in pairs:
        for rows in _parts(states.float(), size):
            for block in head.blocks():
                torch.mm(rows, block.weight.float().t())


def _parts(states: Tensor, size: int) -> Iterator[Tensor]:
    for start in range(0, len(states), size):
        yield states[start : start + size]
