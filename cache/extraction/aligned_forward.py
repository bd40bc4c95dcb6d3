"""The base over trees of tokens: each node sees the nodes on its path only.

Trees go through the base as rows with a mask and positions of their own, so a branch costs its own
tokens and not its beginning again. Letters: B trees, L nodes of the longest, R rows, D width.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.cache.alignment.tree import depths, split_tree, visible
from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base
from carryon.cache.device import HostCopy, to_device
from carryon.cache.errors import DamagedStoreError, InputError
from carryon.cache.extraction.packing import plan_batches
from carryon.cache.extraction.prediction import Pilot, TimedBatch, spread
from carryon.cache.format.alignment import UnitAlignment
from carryon.cache.progress import Progress

_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Mean relative error of states at branches against rows of their own; a base that does not see
the mask is off by more than a third."""
_LONGEST_PROBE = 1100
"""Nodes of the tree that a base is tried with: more than the windows of small bases."""

MAX_NODES = 1 << 14
"""Of a tree that goes through the base at one time: its mask takes 0.5 GB in bfloat16."""


def tree_inputs(base: Base, parents: Sequence[NDArray[np.int32]]) -> dict[str, Any]:
    """Return mask and positions for trees of tokens, padded on the right.

    Args:
        base: that will run.
        parents: of each tree, [n] each.
    """
    longest = max(map(len, parents))
    seen = np.zeros((len(parents), longest, longest), dtype=np.bool_)
    places = np.zeros((len(parents), longest), dtype=np.int64)
    for row, each in enumerate(parents):
        seen[row, : len(each), : len(each)] = visible(each)
        places[row, : len(each)] = depths(each)
    seen[:, range(longest), range(longest)] = True
    return attention_inputs(base, seen, places, places)


def attention_inputs(
    base: Base,
    seen: NDArray[np.bool_],
    places: NDArray[np.int64],
    key_places: NDArray[np.int64],
) -> dict[str, Any]:
    """Return mask and positions of tokens, by which of all tokens each of them sees.

    Args:
        base: that will run.
        seen: [B, L, K]; K tokens, those that are cached first.
        places: [B, L] position of each in its text.
        key_places: [B, K] likewise of all.
    """
    config: Any = base.model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    full = _mask(base, seen)
    mask: Tensor | dict[str, Tensor] = full
    if window and ("sliding_attention" in kinds or not kinds):
        distance = places[:, :, None] - key_places[:, None, :]
        near = _mask(base, seen & (distance < window))
        mask = {"full_attention": full, "sliding_attention": near} if kinds else near
    return {
        "attention_mask": mask,
        "position_ids": to_device(torch.from_numpy(places), base.device),
    }


def compute_aligned_states(
    base: Base,
    taps: Sequence[str],
    alignment: UnitAlignment,
    num_nodes: NDArray[np.int32],
    *,
    keeps_bits: bool,
    batch_tokens: int,
    progress: Progress | None = None,
    pilot: Pilot | None = None,
) -> dict[str, NDArray[Any]]:
    """Run the base over the trees of a unit.

    Args:
        base: of the store.
        taps: of the store, with `stable`.
        alignment: of the unit.
        num_nodes: nodes of each of its samples.
        keeps_bits: return bits of bfloat16.
        batch_tokens: nodes in one forward pass, pads included.
        progress: counts rows.
        pilot: counts the batches of the first units.

    Returns:
        For each tap [R, D]: uint16 bits of bfloat16 if `keeps_bits`, else float32. Rows without
        a node are 0.
    """
    dtype = np.uint16 if keeps_bits else np.float32
    shape = (len(alignment.exact), base.identity.width)
    hidden: dict[str, NDArray[Any]] = {tap: np.zeros(shape, dtype) for tap in taps}
    stops = np.cumsum(num_nodes)
    starts = stops - num_nodes
    has_nodes = np.flatnonzero(num_nodes)
    run_taps = [tap for tap in taps if tap != "stable"]
    is_done = np.zeros(len(alignment.exact), dtype=np.bool_)
    batches = plan_batches(num_nodes[has_nodes], batch_tokens=batch_tokens)
    for batch in spread(batches) if pilot is not None else batches:
        started_at, was_done = time.perf_counter(), is_done.copy()
        chosen = has_nodes[batch]
        trees = [_local(alignment.parents, starts[x], stops[x]) for x in chosen]
        for parts in _split(base, trees):
            ids = _padded_tokens(alignment.tokens, starts[chosen], parts)
            states = _run_parts(base, run_taps, trees, parts, ids, keeps_bits=keeps_bits)
            before = int(is_done.sum())
            for tap in taps:
                values = states["final" if tap == "stable" else tap]
                nodes = alignment.stable if tap == "stable" else alignment.exact
                for number, (sample, part) in enumerate(zip(chosen, parts, strict=True)):
                    rows, at = _rows_of_part(nodes, part, starts[sample], stops[sample])
                    hidden[tap][rows] = values[number, at]
                    if tap == taps[0]:
                        is_done[rows] = True
            if progress is not None:
                progress.update(int(is_done.sum()) - before)
        if pilot is not None:
            seconds = time.perf_counter() - started_at
            rows = np.flatnonzero(is_done & ~was_done)
            made = {tap: states[rows] for tap, states in hidden.items()}
            pilot.add(made, rows, TimedBatch.of(num_nodes[chosen], seconds=seconds))
    return hidden


def _split(base: Base, trees: Sequence[NDArray[np.int32]]) -> Iterator[list[NDArray[np.int64]]]:
    """Yield which nodes of a batch's trees go through the base at one time: mostly all.

    The mask grows with the square of a tree, and a store may say that a tree has any size. So one
    that is larger than the base's longest text would need is taken in parts.

    Raises:
        DamagedStoreError: a path is longer than the base can read.
    """
    context = base.identity.context_tokens
    for tree in trees:
        if len(tree) > context and (deepest := int(depths(tree).max()) + 1) > context:
            raise DamagedStoreError(
                f"aligned: expected paths of at most {context} tokens, the context of "
                f"{base.source}, got {deepest}",
                fix="extract into another folder",
            )
    if max(map(len, trees)) <= MAX_NODES:
        yield [np.arange(len(tree)) for tree in trees]
        return
    for number, tree in enumerate(trees):
        deepest = int(depths(tree).max()) + 1
        # a quarter at least is new in each part, so that all of them cost a few times the tree
        for part in split_tree(tree, max_nodes=max(MAX_NODES, deepest + deepest // 4)):
            none = np.empty(0, dtype=np.int64)
            yield [part if number == other else none for other in range(len(trees))]


def _padded_tokens(
    tokens: NDArray[np.int32], starts: NDArray[np.int64], parts: Sequence[NDArray[np.int64]]
) -> Tensor:
    """Return the tokens of some nodes of each tree, whose first is at `starts`: [B, L] int64."""
    ids = np.zeros((len(parts), max(map(len, parts))), dtype=np.int64)
    for row, (start, part) in enumerate(zip(starts, parts, strict=True)):
        ids[row, : len(part)] = tokens[start + part]
    return torch.from_numpy(ids)


def _run_parts(
    base: Base,
    taps: Sequence[str],
    trees: Sequence[NDArray[np.int32]],
    parts: Sequence[NDArray[np.int64]],
    ids: Tensor,
    *,
    keeps_bits: bool,
) -> dict[str, NDArray[Any]]:
    """Return the states of some nodes of each tree, whose tokens are `ids`: [B, L, D] by tap."""
    parents = [_of_part(tree, part) for tree, part in zip(trees, parts, strict=True)]
    states = capture(base, taps, ids, tree_inputs(base, parents))
    copies = {  # all begin before the first is read
        tap: HostCopy(each.bfloat16().view(torch.uint16) if keeps_bits else each.float())
        for tap, each in states.items()
    }
    return {tap: copy.read().numpy() for tap, copy in copies.items()}


def _rows_of_part(
    nodes: NDArray[np.int32], part: NDArray[np.int64], start: int, stop: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows of a unit whose node is among `part` of a tree, and where in `part` it is.

    Args:
        nodes: [R] node of each row, counted from the unit's first; -1 for none.
        part: nodes of the tree, counted from its own first.
        start: first node of the tree.
        stop: node behind its last.
    """
    places = np.full(stop - start, -1, dtype=np.int64)
    places[part] = np.arange(len(part))
    rows = np.flatnonzero((nodes >= start) & (nodes < stop))
    at = places[nodes[rows] - start]
    return rows[at >= 0], at[at >= 0]


def _of_part(parents: NDArray[np.int32], part: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the parents within some nodes of a tree, which hold the paths to all of them."""
    places = np.cumsum(np.bincount(part, minlength=len(parents))) - 1
    own = parents[part]
    return np.where(own >= 0, places[own], -1).astype(np.int32)


def check_tree_forward(base: Base) -> None:
    """Check that the base gives a branch of a tree the states of a row of its own.

    Raises:
        InputError: its layers are not plain attention, or take no mask.
    """
    name = base.identity.architecture
    config: Any = base.model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    most = min(_LONGEST_PROBE, base.identity.context_tokens)
    length = min(window + 8, most - 4) if window else min(24, most - 4)
    draw = np.random.default_rng(0)
    trunk = draw.integers(0, base.identity.vocab_size, size=length)
    branch = draw.integers(0, base.identity.vocab_size, size=3)
    fork = length - 4
    parents = np.array([*range(-1, length - 1), fork, length, length + 1], dtype=np.int32)
    ids = torch.from_numpy(np.concatenate([trunk, branch]))[None]
    alone = torch.from_numpy(np.concatenate([trunk[: fork + 1], branch]))[None]
    try:
        made = capture(base, ["final"], ids, tree_inputs(base, [parents]))["final"][0, -3:]
        expected = capture(base, ["final"], alone)["final"][0, -3:]
        made, expected = made.float(), expected.float()
        error = float(((made - expected).norm(dim=1) / expected.norm(dim=1)).mean())
        problem = f"states that are off by {error:.3f}"
    except Exception as caught:  # whatever an architecture makes of a mask that it does not expect
        error, problem = float("inf"), f"{type(caught).__name__}: {caught!s:.120}"
    if not error <= _TOLERANCE.get(base.compute_dtype, 6e-2):
        raise InputError(
            f"base {base.source}: expected attention layers that take a mask, to be aligned in one "
            f"pass, got {name} with {problem}. Fix: use another base, or --attention sdpa"
        )


def _mask(base: Base, seen: NDArray[np.bool_]) -> Tensor:
    """Return what is added to attention scores, [B, 1, L, L] in the compute dtype."""
    mask = torch.zeros(seen.shape, dtype=base.compute_dtype)
    mask.masked_fill_(torch.from_numpy(~seen), torch.finfo(base.compute_dtype).min)
    return to_device(mask[:, None], base.device)


def _local(parents: NDArray[np.int32], start: int, stop: int) -> NDArray[np.int32]:
    """Return the parents within one sample's tree."""
    own = parents[start:stop]
    return np.where(own >= 0, own - start, -1).astype(np.int32)
