"""Steps of experiment-mix that measure: bytes of a store, and losses at straddled positions.

A position is straddled if the text up to it ends inside a token of another base: its tokenization
of exactly that text is then another one than that of the whole.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.device import pick_chunk, pick_device
from carryon.cache.format.alignment import UnitAlignment, read_alignment, read_num_nodes
from carryon.cache.store.reader import Store
from carryon.tools.cli.output import print_result
from carryon.train.config import LossSettings, StreamSettings
from carryon.train.data.loader import Stream
from carryon.train.data.sampler import plan_pass
from carryon.train.data.split import sample_units
from carryon.train.losses.base_states import get_base_states
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import place_head
from carryon.train.mixing.mixture import MixedCarryOn, load_mixture
from carryon.train.mixing.projected import project_sources, rows_of
from carryon.train.mixing.sources import Vocabulary, join_states, open_sources, order_sources
from carryon.train.modules.carryon import taps_of
from carryon.train.trainer.step import losses_of_delta, pair_delta

_BATCH_TOKENS = 2048


def count_bytes(*, store: str) -> dict[str, Any]:
    """Count the held-out targets of a store and their bytes of text; a step of experiment-mix.

    Example:
        python -m carryon.tools.bench mix-bytes --store store

    Args:
        store: Folder of a store that marks its held-out samples.
    """
    opened = Store.open(store)
    sizes = np.array([len(word or b"") for word in Vocabulary.read(opened).tokens])
    targets = num_bytes = 0
    for unit in opened.iter_units(taps=[]):
        is_target = (unit.loss_mask == 1) & _held_out(opened, unit.unit)
        is_target[unit.starts] = False
        targets += int(is_target.sum())
        num_bytes += int(sizes[unit.tokens[is_target]].sum())
    result = {"store": store, "targets": targets, "bytes": num_bytes}
    return print_result(result, f"{store}: {targets:,} held-out targets of {num_bytes:,} bytes")


def _held_out(store: Store, number: int) -> NDArray[np.bool_]:
    """Return which rows of a unit belong to held-out samples."""
    chosen = np.zeros(store.unit_tokens, dtype=np.bool_)
    for sample in store.unit_samples(number):
        first = int(store.sample_starts[sample]) - number * store.unit_tokens
        if store.sample_held_out[sample]:
            chosen[first : first + int(store.sample_lengths[sample])] = True
    return chosen


def measure_places(
    *, store: str, mix: list[str], carryon: str, device: str = "auto"
) -> dict[str, Any]:
    """Measure a mixture and its anchor where a token of another base is straddled, and elsewhere.

    A step of experiment-mix.

    Example:
        python -m carryon.tools.bench mix-places --store A --mix B --carryon run/carryon

    Args:
        store: Folder of the anchor's store, which marks its held-out samples.
        mix: Folders of the stores that are aligned to it.
        carryon: Folder of the mixture.
        device: `auto`, `cpu`, `cuda`, ...
    """
    opened, place = Store.open(store), pick_device(device)
    rows, base_losses, losses = _held_out_losses(opened, mix, carryon, place)
    is_straddled = np.zeros(opened.num_units * opened.unit_tokens, dtype=np.bool_)
    for path in mix:
        for number, marks in _straddled_units(Store.open(path, allow_aligned=True)):
            first = number * opened.unit_tokens
            is_straddled[first : first + len(marks)] |= marks
    chosen = is_straddled[rows]
    result: dict[str, Any] = {"store": store, "carryon": carryon}
    for name, some in (("straddled", chosen), ("elsewhere", ~chosen)):
        result[name] = {
            "targets": int(some.sum()),
            "base_nll": float(base_losses[some].mean()) if some.any() else None,
            "mixture_nll": float(losses[some].mean()) if some.any() else None,
        }
    own = result["straddled"]
    return print_result(
        result,
        f"{carryon}: {own['targets']:,} of {len(rows):,} held-out targets straddled: "
        f"base {own['base_nll']}, mixture {own['mixture_nll']}",
    )


@torch.no_grad()
def _held_out_losses(
    store: Store, mix: list[str], carryon: str, device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Return rows of the held-out positions, and the losses there of base and mixture."""
    stream, loss = StreamSettings(), LossSettings()
    module, card = load_mixture(carryon, blocks=store.blocks)
    module, head = module.to(device).eval(), place_head(store, loss, device=device)
    base = get_base_states(store, device=device)
    sources = order_sources(open_sources(store, mix), card.mixture)
    joined = join_states(store, sources)
    projected = None
    if card.has_gate:
        options: dict[str, Any] = {"stream": stream, "loss": loss, "device": device}
        projected = project_sources(store, sources, base=base, **options)
    windows = plan_pass(
        np.flatnonzero(store.sample_held_out),
        lengths=store.sample_lengths,
        units=sample_units(store),
        tokens_per_step=_BATCH_TOKENS,
    )
    taps = list(dict.fromkeys([*taps_of(module), base.tap]))
    chunk = pick_chunk(loss.chunk_tokens)
    found: list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]] = []
    with Stream(joined, windows, taps=taps, settings=stream, is_pinned=False) as steps:
        for batch in (each.to(device) for batches in steps for each in batches):
            if not batch.num_targets:
                continue
            states = base.at_pairs(batch, head)
            alone = token_losses(states, batch.targets, head=head, chunk=chunk)
            own = losses_of_delta(
                module, pair_delta(module, batch, head=head), batch, head=head, chunk=chunk, alpha=1
            )
            mixed = own
            if projected is not None and isinstance(module, MixedCarryOn):
                mixed = module.mix(own, states, projected.at_pairs(batch, device=device)).losses
            rows = rows_of(batch, store.sample_starts)
            found.append((rows, alone.float().cpu().numpy(), mixed.float().cpu().numpy()))
    return (
        np.concatenate([rows for rows, _, _ in found]),
        np.concatenate([of_base for _, of_base, _ in found]),
        np.concatenate([of_mixture for _, _, of_mixture in found]),
    )


def _straddled_units(store: Store) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yield the number of each unit of an aligned store, and which of its rows are straddled."""
    num_nodes = read_num_nodes(store.root, store.manifest)
    for number in range(store.num_units):
        alignment = read_alignment(store.root, store.manifest, number)
        yield number, straddled(alignment, num_nodes[list(store.unit_samples(number))])


def straddled(alignment: UnitAlignment, num_nodes: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return which rows of a unit end inside a token of the whole text, [R].

    Args:
        alignment: of the unit.
        num_nodes: [s] nodes of each of its samples, whose trunks come first.
    """
    is_trunk, first = np.zeros(len(alignment.parents), dtype=np.bool_), 0
    for count in num_nodes.tolist():
        chain = alignment.parents[first : first + count] == np.arange(first - 1, first + count - 1)
        chain[:1] = True  # the first node has no parent
        stop = count if chain.all() else int(np.argmin(chain))
        is_trunk[first : first + stop] = True
        first += count
    is_known = alignment.exact >= 0
    at_trunk = np.zeros(len(is_known), dtype=np.bool_)
    at_trunk[is_known] = is_trunk[alignment.exact[is_known]]
    found: NDArray[np.bool_] = is_known & ~(at_trunk & (alignment.is_whole == 1))
    return found
