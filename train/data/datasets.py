"""The data of training runs: one store or several, their halves, and the order of every epoch.

Runs on the same data share one TrainData, and with it the planned windows of equal settings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import InputError
from carryon.cache.store.decoded_cache import DecodedCache, open_cache
from carryon.cache.store.reader import Store
from carryon.cache.store.view import StoreLike
from carryon.train.config import OptimizationSettings, StreamSettings, TrainSettings
from carryon.train.data.mixture import MixedStore, open_stores
from carryon.train.data.sampler import Window, iter_epoch
from carryon.train.data.split import (
    Split,
    refuse_pairs,
    sample_units,
    split_marked,
)
from carryon.train.modules.taps import check_taps, resolve_taps, stream_taps

ROOM = 1.25
"""Memory of a window as a multiple of its states: a batch takes as much as the longest."""
StorePaths = str | Path | Store | Sequence[str | Path | Store]
"""The folder of a store, an open store, or several of them."""


def store_paths(store: StorePaths) -> list[str]:
    """Return the folders that a call names."""
    stores = [store] if isinstance(store, (str, Path, Store)) else store
    return [each.name if isinstance(each, Store) else str(each) for each in stores]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainData:
    """A store, or several read as one, and its halves."""

    store: StoreLike
    split: Split
    settings: StreamSettings
    """As given, except `window_units`, which the memory may lower."""
    mix_fingerprints: tuple[str, ...] = ()
    """Of the stores of other bases that are mixed in."""
    decoded: DecodedCache | None = None
    """Keeps decoded states of the stores. None: nothing does."""
    planned: dict[tuple[int, ...], list[Window]] = field(default_factory=dict)
    """Epochs planned so far, by the settings that decide them."""

    @property
    def fingerprints(self) -> list[str]:
        """Fingerprint of each store."""
        return [store.fingerprint for store in self.stores]

    @property
    def stores(self) -> Sequence[StoreLike]:
        """The store, or each of several."""
        return self.store.stores if isinstance(self.store, MixedStore) else [self.store]

    def resolve(self, settings: TrainSettings) -> TrainSettings:
        """Return settings with the tap and the learning rate of the carry-on's kind on this base.

        Raises:
            InputError: the kind does not fit the base, or the store lacks a tap.
        """
        carryon = resolve_taps(settings.carryon, self.store.base.get("num_layers", 0))
        check_taps(self.store, stream_taps(carryon))
        return replace(settings, carryon=carryon).resolved()

    def plan(self, optimization: OptimizationSettings) -> list[list[Window]]:
        """Return the windows of every epoch; equal settings get the same objects."""
        budget, micro = optimization.tokens_per_step, optimization.micro_batch_tokens
        epochs = []
        for epoch in range(optimization.epochs):
            key = (optimization.seed, budget, micro, epoch)
            if key not in self.planned:
                self.planned[key] = plan_store_epoch(
                    self.store,
                    self.split.train,
                    seed=self.settings.data_seed,
                    epoch=epoch,
                    tokens_per_step=budget,
                    micro_batch_tokens=micro,
                    window_units=self.settings.window_units,
                    shuffle_seed=optimization.seed,
                )
            epochs.append(self.planned[key])
        return epochs


def open_data(
    paths: Sequence[str], settings: TrainSettings, *, taps: Sequence[str] | None = None
) -> TrainData:
    """Open and check the stores, and split them; nothing is written.

    Args:
        paths: folders of the stores.
        settings: of the runs.
        taps: taps to read. None: those that the carry-on reads.

    Raises:
        InputError: the stores do not fit together, lack a tap or hold preference pairs, one half
            would be empty, one unit does not fit into the memory, or the decoded cache is a folder
            of something else.
    """
    stream = settings.stream
    decoded = open_decoded_cache(stream)
    store = open_stores(paths, stream.store_weights, decoded=decoded)
    refuse_pairs(store)
    if taps is None:
        taps = stream_taps(resolve_taps(settings.carryon, store.base.get("num_layers", 0)))
    check_taps(store, taps)
    units = window_units(store, stream, taps=taps)
    return TrainData(
        store=store,
        split=split_store(store, stream),
        settings=replace(stream, window_units=units),
        decoded=decoded,
    )


def open_decoded_cache(settings: StreamSettings) -> DecodedCache | None:
    """Return the decoded cache that the settings name, if they do.

    Raises:
        InputError: it is a file, or a folder of something else.
    """
    return open_cache(settings.decoded_cache, max_gb=settings.decoded_cache_gb)


def split_store(store: StoreLike, settings: StreamSettings) -> Split:
    """Return the training and the held-out samples of a store or a mix.

    Raises:
        InputError: one of the halves would be empty, or the data marked held-out samples of
            which none is left.
    """
    share, seed = settings.held_out_ratio, settings.data_seed
    if isinstance(store, MixedStore):
        return store.split(share=share, seed=seed)
    return split_marked(store, share=share, seed=seed)


def plan_store_epoch(
    store: StoreLike,
    samples: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    **options: Any,  # noqa: ANN401
) -> list[Window]:
    """Return the windows of an epoch; arguments as of `iter_store_epoch`."""
    return list(iter_store_epoch(store, samples, seed=seed, epoch=epoch, **options))


def iter_store_epoch(
    store: StoreLike,
    samples: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    **options: Any,  # noqa: ANN401
) -> Iterator[Window]:
    """Return the windows of an epoch over samples of a store, or over a mix by its weights.

    Args:
        store: the store or the mix.
        samples: indices, in stored order.
        seed: of the order of units.
        epoch: counted from 0.
        options: as in `iter_epoch`.
    """
    seeds = (seed, int(store.samples_digest[:16], 16))
    kinds = None
    if isinstance(store, MixedStore):
        samples = store.epoch_samples(samples, seed=seeds, epoch=epoch)
        kinds = store.sample_kinds
    return iter_epoch(
        samples,
        lengths=store.sample_lengths,
        units=sample_units(store),
        seed=seeds,
        epoch=epoch,
        kinds=kinds,
        **options,
    )


def window_units(store: StoreLike, settings: StreamSettings, *, taps: Sequence[str]) -> int:
    """Return the units of a window: those of the settings, or as many as fit into the memory.

    Raises:
        InputError: not even one fits.
    """
    two_units = int(2 * store.unit_tokens * store.row_bytes(taps) * ROOM)
    fitting = int(settings.host_memory_gb * 1e9) // max(1, two_units)
    if fitting < 1:
        raise InputError(
            f"host_memory_gb: expected {two_units / 1e9:.2g} or more, for two units of "
            f"{store.name}, got {settings.host_memory_gb:g}"
        )
    return min(settings.window_units, fitting)
