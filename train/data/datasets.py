"""What is trained on: stores, their halves, and the order of every epoch.

Runs on the same data share one, and with it the planned windows of equal settings.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from carryon.cache.errors import InputError
from carryon.cache.store.view import StoreLike
from carryon.train.config import OptimizationSettings, StreamSettings, TrainSettings
from carryon.train.data.mixture import MixedStore, open_stores
from carryon.train.data.sampler import Window, plan_epoch
from carryon.train.data.split import Split, sample_units, split_samples
from carryon.train.modules.taps import check_taps, resolve_taps, stream_taps

ROOM = 1.25
"""Memory that a window takes, in parts of its states: batches take as much as the longest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainData:
    """A store, or several as one, and how it is split."""

    store: StoreLike
    split: Split
    settings: StreamSettings
    """As given, but for `window_units`, which the memory may lower."""
    planned: dict[tuple[int, ...], list[Window]] = field(default_factory=dict)
    """Epochs planned so far, by what they depend on."""

    @property
    def seed(self) -> tuple[int, int]:
        """What the order of units is drawn from."""
        return self.settings.data_seed, int(self.store.samples_digest[:16], 16)

    @property
    def fingerprints(self) -> list[str]:
        """Of each store."""
        stores = self.store.stores if isinstance(self.store, MixedStore) else [self.store]
        return [store.fingerprint for store in stores]

    def resolve(self, settings: TrainSettings) -> TrainSettings:
        """Return settings with the tap and the learning rate of the carry-on's kind on this base.

        Raises:
            InputError: the kind does not fit the base, or the store lacks a tap.
        """
        carryon = resolve_taps(settings.carryon, self.store.base.get("num_layers", 0))
        check_taps(self.store, stream_taps(carryon))
        return replace(settings, carryon=carryon).resolved()

    def plan(self, optimization: OptimizationSettings) -> list[list[Window]]:
        """Return the windows of every epoch; equal ones are one object, whoever asks."""
        return [self._plan_epoch(optimization, epoch) for epoch in range(optimization.epochs)]

    def _plan_epoch(self, optimization: OptimizationSettings, epoch: int) -> list[Window]:
        budget, micro = optimization.tokens_per_step, optimization.micro_batch_tokens
        key = (optimization.seed, budget, micro, epoch)
        if key not in self.planned:
            store, samples = self.store, self.split.train
            is_mixed = isinstance(store, MixedStore)
            if isinstance(store, MixedStore):
                samples = store.epoch_samples(samples, seed=self.seed, epoch=epoch)
            self.planned[key] = plan_epoch(
                samples,
                lengths=store.sample_lengths,
                units=sample_units(store),
                seed=self.seed,
                epoch=epoch,
                tokens_per_step=budget,
                micro_batch_tokens=micro,
                window_units=self.settings.window_units,
                shuffle_seed=optimization.seed,
                kinds=store.sample_kinds if is_mixed else None,  # type: ignore[attr-defined]
            )
        return self.planned[key]


def open_data(
    paths: Sequence[str], settings: TrainSettings, *, taps: Sequence[str] | None = None
) -> TrainData:
    """Open and check the stores, and split them; nothing is written.

    Args:
        paths: folders of the stores.
        settings: of the runs.
        taps: taps to read. None: those that the carry-on reads.

    Raises:
        InputError: the stores do not fit together or lack a tap, one half would be empty, or one
            unit does not fit into the memory.
    """
    stream = settings.stream
    store = open_stores(paths, stream.store_weights)
    if taps is None:
        taps = stream_taps(resolve_taps(settings.carryon, store.base.get("num_layers", 0)))
    check_taps(store, taps)
    share, seed = stream.held_out_ratio, stream.data_seed
    if isinstance(store, MixedStore):
        split = store.split(share=share, seed=seed)
    else:
        split = split_samples(
            store.sample_held_out, share=share, seed=seed, digest=store.samples_digest
        )
    return TrainData(
        store=store,
        split=split,
        settings=replace(stream, window_units=window_units(store, stream, taps=taps)),
    )


def window_units(store: StoreLike, settings: StreamSettings, *, taps: Sequence[str]) -> int:
    """Return the units of a window: as many as asked for, or as the memory holds.

    Raises:
        InputError: it does not hold one.
    """
    row_bytes = store.width * store.states_dtype.itemsize * len(taps)
    two_units = int(2 * store.unit_tokens * row_bytes * ROOM)
    fitting = int(settings.host_memory_gb * 1e9) // two_units
    if fitting < 1:
        raise InputError(
            f"host_memory_gb: expected {two_units / 1e9:.2g} or more, for two units of "
            f"{store.root}, got {settings.host_memory_gb:g}"
        )
    return min(settings.window_units, fitting)
