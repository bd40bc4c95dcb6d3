"""Which base of a mixture each token of a sample leaned on, from the stores alone.

Letters: M targets of the sample, S other bases, T tokens of the sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.cache.device import pick_chunk, pick_device
from carryon.cache.errors import InputError
from carryon.cache.store.reader import Store
from carryon.cache.store.view import StoreLike
from carryon.train.config import LossSettings, StreamSettings
from carryon.train.data.loader import Stream
from carryon.train.data.sampler import plan_pass
from carryon.train.data.split import sample_units
from carryon.train.losses.base_states import get_base_states
from carryon.train.losses.cross_entropy import token_losses
from carryon.train.losses.frozen_head import place_head
from carryon.train.mixing.mixture import MixedCarryOn, load_mixture
from carryon.train.mixing.mixture_nll import OWN
from carryon.train.mixing.projected import project_sources
from carryon.train.mixing.sources import join_states, open_sources, order_sources
from carryon.train.modules.card import check_base
from carryon.train.modules.carryon import taps_of
from carryon.train.modules.serialization import locate_carryon
from carryon.train.modules.taps import check_taps, stream_taps
from carryon.train.trainer.step import losses_of_delta, pair_delta

if TYPE_CHECKING:
    from carryon.train.data.batch import Batch


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenShares:
    """A sample, and what the gate gave to each base at its targets."""

    id: str
    names: Sequence[str]
    """Of the carry-on (`carry-on`) and of each other base, in the order of the columns."""
    tokens: NDArray[np.int32]
    """[T]."""
    spelled: Sequence[bytes | None]
    """[T] bytes of each token; None for special tokens."""
    targets: NDArray[np.int64]
    """[M] places of the targets among the tokens, ascending."""
    gate: NDArray[np.float32]
    """[M, 1 + S] share of each base before the target is known; a row's sum is 1."""
    parts: NDArray[np.float32]
    """[M, 1 + S] which part of the target's probability is of which base; a row's sum is 1."""
    losses: NDArray[np.float32]
    """[M] loss of the mixture, in nats."""
    carryon_losses: NDArray[np.float32]
    """[M] loss of base and carry-on without the gate, in nats."""


def measure_token_shares(
    store: Store,
    index: int,
    *,
    carryon: str | Path,
    mix: Sequence[str],
    device: str = "auto",
    stream: StreamSettings | None = None,
    loss: LossSettings | None = None,
) -> TokenShares:
    """Return the shares of a mixture's bases at the targets of a sample.

    Projections of the whole store are read from the cache, or computed and cached.

    Args:
        store: of the anchor.
        index: of the sample.
        carryon: folder of a carry-on with a gate, or its id on the hub.
        mix: folders of the stores of the other bases, in any order.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        stream: how the store is read. None: the defaults.
        loss: how the LM-head loss is computed. None: the defaults.

    Raises:
        InputError: the carry-on has no gate, or the sample no targets.
        SettingMismatchError: a store is of another base than in training.
    """
    stream, loss = stream or StreamSettings(), loss or LossSettings()
    module, card = load_mixture(locate_carryon(carryon), blocks=store.blocks)
    check_base(card, store.manifest.base, where=str(store.root))
    if not isinstance(module, MixedCarryOn):
        raise InputError(
            f"{carryon}: expected a carry-on with a gate, got one that reads the states of other "
            "bases, which has no shares. Fix: train with --mix-by probability"
        )
    check_taps(store, stream_taps(module.settings))
    place = pick_device(device)
    module, head = module.to(place).eval(), place_head(store, loss, device=place)
    sources = order_sources(open_sources(store, mix), card.mixture)
    joined = join_states(store, sources)
    base = get_base_states(joined, device=place)
    taps = list(dict.fromkeys([*taps_of(module), base.tap]))
    batch = _read_batch(joined, index, taps=taps, stream=stream).to(place)
    if not batch.num_targets:
        raise InputError(f"{store.sample_id(index)!r}: expected a sample with targets, got none")
    projected = project_sources(joined, sources, base=base, stream=stream, loss=loss, device=place)
    chunk = pick_chunk(loss.chunk_tokens)
    with torch.no_grad():
        own = base.at_pairs(batch, head)
        if card.alpha:
            delta = pair_delta(module, batch, head=head)
            losses = losses_of_delta(module, delta, batch, head=head, chunk=chunk, alpha=card.alpha)
        else:
            losses = token_losses(own, batch.targets, head=head, chunk=chunk)
        mixed = module.mix(losses, own, projected.at_pairs(batch, device=place))
    stored = store.read_sample(index, taps=[])
    spelled = sources[0].vocabulary_map.anchor
    arrays = (mixed.gate, mixed.targets, mixed.losses, losses)
    gate, parts, mixture, carryon_losses = (each.float().cpu().numpy() for each in arrays)
    return TokenShares(
        id=stored.id,
        names=[OWN, *projected.names],
        tokens=stored.tokens,
        spelled=[spelled[token] for token in stored.tokens.tolist()],
        targets=batch.positions.cpu().numpy() + 1,
        gate=gate,
        parts=parts,
        losses=mixture,
        carryon_losses=carryon_losses,
    )


def _read_batch(
    store: StoreLike, index: int, *, taps: Sequence[str], stream: StreamSettings
) -> "Batch":
    """Return one sample as a batch."""
    windows = plan_pass(
        np.array([index], dtype=np.int64),
        lengths=store.sample_lengths,
        units=sample_units(store),
        tokens_per_step=int(store.sample_lengths[index]),
    )
    with Stream(store, windows, taps=list(taps), settings=stream, is_pinned=False) as steps:
        [batches] = list(steps)
    [batch] = batches
    return batch
