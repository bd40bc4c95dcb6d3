"""Several stores as one: their units and samples one after another, each as often as it weighs.

A store of weight 2 stands in it twice, so that an epoch goes through it twice; of a weight with a
fraction, an epoch takes that part of the last time, and the next epoch goes on behind it. A mix
is read like any store. Letters: S samples of the mix.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import Head
from carryon.cache.errors import InputError
from carryon.cache.format.manifest import digest_of
from carryon.cache.format.receipt import Receipt
from carryon.cache.store.reader import Store, Unit
from carryon.cache.store.shard_reader import CopyRange
from carryon.cache.store.view import open_store
from carryon.train.data.split import Split, split_samples


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """One appearance of a store in a mix."""

    store: Store
    number: int
    """Which of the stores."""
    is_repeat: bool
    share: float
    """Part of its training samples that an epoch takes."""
    first_unit: int
    first_sample: int


class MixedStore(Store):
    """Stores of one base, read as one."""

    def __init__(self, stores: Sequence[Store], weights: Sequence[float]) -> None:
        """Lay the stores one after another; nothing is read.

        Args:
            stores: two or more.
            weights: how often an epoch goes through each.

        Raises:
            InputError: the stores do not fit together, or the weights do not fit them.
        """
        weights = list(weights) or [1.0] * len(stores)
        if len(weights) != len(stores):
            raise InputError(
                f"store_weights: expected {len(stores)} as there are stores, got {len(weights)}"
            )
        _check_alike(stores)
        first = stores[0]
        rows = max(store.manifest.unit_tokens for store in stores)
        manifest = replace(first.manifest, settings=first.manifest.settings | {"unit_tokens": rows})
        super().__init__(first.root, manifest, set())
        self.stores = list(stores)
        self.fingerprint = digest_of(
            {"stores": [store.fingerprint for store in stores], "weights": weights}
        )
        self.samples_digest = digest_of(
            {"stores": [store.samples_digest for store in stores], "weights": weights}
        )
        self._places = _lay_out(stores, weights)
        self.finished_units = set(range(self.num_units))

    @property
    def num_units(self) -> int:
        """Units of all appearances."""
        return sum(place.store.num_units for place in self._places)

    @property
    def num_samples(self) -> int:
        """S, samples of all appearances."""
        return sum(place.store.num_samples for place in self._places)

    @property
    def num_tokens(self) -> int:
        """Tokens of all appearances."""
        return sum(place.store.num_tokens for place in self._places)

    @cached_property
    def sample_starts(self) -> NDArray[np.int64]:
        """[S] first row of each sample, every unit as long as the longest."""
        found = []
        for place in self._places:
            unit, row = np.divmod(place.store.sample_starts, place.store.manifest.unit_tokens)
            found.append((place.first_unit + unit) * self.manifest.unit_tokens + row)
        return np.concatenate(found)

    @cached_property
    def sample_lengths(self) -> NDArray[np.int32]:
        """[S] tokens of each sample."""
        return np.concatenate([place.store.sample_lengths for place in self._places])

    @cached_property
    def sample_held_out(self) -> NDArray[np.uint8]:
        """[S] 1 where the sample's corpus keeps it from training."""
        return np.concatenate([place.store.sample_held_out for place in self._places])

    @cached_property
    def sample_kinds(self) -> NDArray[np.int64]:
        """[S] the appearance that each sample belongs to."""
        sizes = [place.store.num_samples for place in self._places]
        return np.repeat(np.arange(len(sizes)), sizes)

    def sample_id(self, sample: int) -> str:
        """Return the id of a sample, behind the folder of its store."""
        place = self._place_of_sample(sample)
        return f"{place.store.root}:{place.store.sample_id(sample - place.first_sample)}"

    def receipt(self, unit: int) -> Receipt:
        """Return the receipt of a unit."""
        place = self._place_of_unit(unit)
        return place.store.receipt(unit - place.first_unit)

    def read_unit(self, unit: int, *, taps: Sequence[str] | None = None) -> Unit:
        """Read one unit whole."""
        place = self._place_of_unit(unit)
        found = place.store.read_unit(unit - place.first_unit, taps=taps)
        samples = range(
            found.samples.start + place.first_sample, found.samples.stop + place.first_sample
        )
        return replace(found, unit=unit, samples=samples)

    def copy_states(self, unit: int, tap: str, moves: Sequence[CopyRange]) -> None:
        """Decode rows of a unit's states at a tap straight to where they are wanted."""
        place = self._place_of_unit(unit)
        place.store.copy_states(unit - place.first_unit, tap, moves)

    def head(self) -> Head:
        """Return the frozen head, which all the stores share."""
        return self.stores[0].head()

    def split(self, *, share: float, seed: int) -> Split:
        """Return the split of the mix: each store split by itself, its repeats trained on only."""
        train, held_out = [], []
        for place in self._places:
            found = split_samples(
                place.store.sample_held_out,
                share=share,
                seed=seed,
                digest=place.store.samples_digest,
            )
            train.append(found.train + place.first_sample)
            if not place.is_repeat:
                held_out.append(found.held_out + place.first_sample)
        return Split(train=np.concatenate(train), held_out=np.concatenate(held_out))

    def epoch_samples(
        self, train: NDArray[np.int64], *, seed: Sequence[int], epoch: int
    ) -> NDArray[np.int64]:
        """Return those of the training samples that an epoch takes: a pure function."""
        kinds = self.sample_kinds[train]
        units = self.sample_starts[train] // self.manifest.unit_tokens
        return np.concatenate(
            [
                _part_of_epoch(
                    train[kinds == number],
                    units[kinds == number],
                    share=place.share,
                    seed=[*seed, number],
                    epoch=epoch,
                )
                for number, place in enumerate(self._places)
            ]
        )

    def _place_of_unit(self, unit: int) -> _Place:
        self._check_unit(unit)
        return [place for place in self._places if place.first_unit <= unit][-1]

    def _place_of_sample(self, sample: int) -> _Place:
        self._check_sample(sample)
        return [place for place in self._places if place.first_sample <= sample][-1]


def open_stores(paths: Sequence[str], weights: Sequence[float]) -> Store:
    """Open and check one store, or several as a mix.

    Raises:
        InputError: the stores do not fit together, or the weights do not fit them.
    """
    if not paths:
        raise InputError("store: expected one folder or more, got none")
    if len(set(paths)) != len(paths):
        raise InputError(
            f"store: expected each folder once, got {' '.join(paths)}: a weight of 2 takes one "
            "twice"
        )
    stores = [open_store(path) for path in paths]
    if len(stores) > 1:
        return MixedStore(stores, weights)
    if weights:
        raise InputError(f"store_weights: expected none for a single store, got {weights}")
    return stores[0]


def _lay_out(stores: Sequence[Store], weights: Sequence[float]) -> list[_Place]:
    places: list[_Place] = []
    first_unit = first_sample = 0
    for number, (store, weight) in enumerate(zip(stores, weights, strict=True)):
        for time in range(ceil(weight)):
            places.append(
                _Place(
                    store=store,
                    number=number,
                    is_repeat=time > 0,
                    share=min(1.0, weight - time),
                    first_unit=first_unit,
                    first_sample=first_sample,
                )
            )
            first_unit += store.num_units
            first_sample += store.num_samples
    return places


def _part_of_epoch(
    samples: NDArray[np.int64],
    units: NDArray[np.int64],
    *,
    share: float,
    seed: Sequence[int],
    epoch: int,
) -> NDArray[np.int64]:
    if share >= 1:
        return samples
    # Whole units as far as possible: a part of the samples costs a part of the bytes.
    ranks = np.random.default_rng(seed).permutation(int(units.max()) + 1)
    laid_out = samples[np.argsort(ranks[units], kind="stable")]
    number = max(1, round(share * len(samples)))
    return np.sort(laid_out[(epoch * number + np.arange(number)) % len(samples)])


def _check_alike(stores: Sequence[Store]) -> None:
    first = stores[0]
    for store in stores[1:]:
        facts: list[tuple[str, Any, Any]] = [
            ("width", first.width, store.width),
            ("taps", sorted(first.taps), sorted(store.taps)),
            ("dtype", first.manifest.settings["dtype"], store.manifest.settings["dtype"]),
            ("base", _base(first), _base(store)),
            ("head", _head(first), _head(store)),
        ]
        for name, expected, got in facts:
            if expected != got:
                raise InputError(
                    f"{store.root}: stores that are mixed have one {name}: expected {expected} as "
                    f"{first.root} has, got {got}"
                )


def _base(store: Store) -> str:
    base = store.manifest.base
    return f"{base.get('id')} (weights {str(base.get('weights_sha256'))[:12]})"


def _head(store: Store) -> str:
    # Facts and the digests of the arrays: equal heads give equal logits.
    files = {path: d for path, d in store.manifest.files.items() if path.startswith("head/")}
    return digest_of({"head": store.manifest.head, "files": files})[:12]
