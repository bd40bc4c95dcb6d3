"""Several stores read as one, each weighted by how often an epoch goes through it.

A store of weight 2 appears twice, so an epoch goes through it twice. Of a weight with a fraction,
an epoch takes that part of the last appearance, and the next epoch takes the next part.
Letters: S samples of the mix.
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
from carryon.cache.files.documents import digest_of
from carryon.cache.format.framing import merge_framings
from carryon.cache.store.decoded_cache import DecodedCache
from carryon.cache.store.reader import Store
from carryon.cache.store.samples import StoredSample, Unit
from carryon.cache.store.shard_reader import CopyRange
from carryon.cache.store.top_blocks import Blocks
from carryon.cache.store.view import StoreLike
from carryon.train.data.split import Split, split_marked


@dataclass(frozen=True, slots=True)
class _Place:
    """One appearance of a store in a mix."""

    store: Store
    first_unit: int
    first_sample: int
    share: float
    """Part of its training samples that an epoch takes."""
    is_repeat: bool


class MixedStore(StoreLike):
    """Stores of one base, read as one. The id of a sample is FOLDER:ID."""

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
        self.stores = list(stores)
        self._places = _lay_out(stores, weights)
        self._describe(stores[0].root, stores[0].manifest)
        self.name = " + ".join(store.name for store in stores)
        self.framing = merge_framings([store.framing for store in stores])
        self.fingerprint = digest_of(
            {"stores": [store.fingerprint for store in stores], "weights": weights}
        )
        self.samples_digest = digest_of(
            {"stores": [store.samples_digest for store in stores], "weights": weights}
        )
        self.unit_tokens = max(store.unit_tokens for store in stores)
        placed = [place.store for place in self._places]
        self.num_units = sum(store.num_units for store in placed)
        self.num_samples = sum(store.num_samples for store in placed)
        self.num_tokens = sum(store.num_tokens for store in placed)
        self.finished_units = range(self.num_units)

    @cached_property
    def sample_starts(self) -> NDArray[np.int64]:
        """[S] first row of each sample, every unit as long as the longest."""
        starts = []
        for place in self._places:
            unit, row = np.divmod(place.store.sample_starts, place.store.unit_tokens)
            starts.append((place.first_unit + unit) * self.unit_tokens + row)
        return np.concatenate(starts)

    @cached_property
    def sample_lengths(self) -> NDArray[np.int32]:
        """[S] tokens of each sample."""
        return np.concatenate([place.store.sample_lengths for place in self._places])

    @cached_property
    def sample_held_out(self) -> NDArray[np.uint8]:
        """[S] 1 where the sample's corpus keeps it from training."""
        return np.concatenate([place.store.sample_held_out for place in self._places])

    @cached_property
    def sample_groups(self) -> NDArray[np.uint64]:
        """[S] equal for samples of one record; a repeat's are those of its first appearance."""
        return np.concatenate([place.store.sample_groups for place in self._places])

    @cached_property
    def sample_roles(self) -> NDArray[np.uint8]:
        """[S] 0, or 1 and 2 for the chosen and the rejected answer of a preference pair."""
        return np.concatenate([place.store.sample_roles for place in self._places])

    @cached_property
    def sample_kinds(self) -> NDArray[np.int64]:
        """[S] the appearance that each sample belongs to."""
        sizes = [place.store.num_samples for place in self._places]
        return np.repeat(np.arange(len(sizes)), sizes)

    def sample_id(self, sample: int) -> str:
        """Return the id of a sample, with the folder of its store in front."""
        place = self._place_of_sample(sample)
        return f"{place.store.root}:{place.store.sample_id(sample - place.first_sample)}"

    def index_of(self, sample_id: str) -> int:
        """Return the index of the first appearance of the sample with this id, FOLDER:ID."""
        for place in self._places:
            folder = f"{place.store.root}:"
            if sample_id.startswith(folder) and not place.is_repeat:
                try:
                    own = place.store.index_of(sample_id.removeprefix(folder))
                except InputError:
                    continue  # another part of the same store may have it
                return place.first_sample + own
        raise InputError(
            f"no sample with the id {sample_id!r}: expected FOLDER:ID of a mixed store"
        )

    def read_unit(self, unit: int, *, taps: Sequence[str] | None = None) -> Unit:
        """Read one whole unit."""
        place = self._place_of_unit(unit)
        own = place.store.read_unit(unit - place.first_unit, taps=taps)
        return own.shifted(units=place.first_unit, samples=place.first_sample)

    def read_sample(self, sample: int | str, **options: Any) -> StoredSample:  # noqa: ANN401
        """Read tokens of one sample, with the options of `StoreLike.read_sample`."""
        index = self.index_of(sample) if isinstance(sample, str) else sample
        place = self._place_of_sample(index)
        own = place.store.read_sample(index - place.first_sample, **options)
        return replace(own, index=index, id=self.sample_id(index))

    def copy_states(self, unit: int, tap: str, moves: Sequence[CopyRange]) -> None:
        """Decode rows of a unit's states at a tap straight to where they are wanted."""
        place = self._place_of_unit(unit)
        place.store.copy_states(unit - place.first_unit, tap, moves)

    def head(self, *, is_mapped: bool = False) -> Head:
        """Return the frozen head, which all the stores share."""
        return self.stores[0].head(is_mapped=is_mapped)

    def blocks(self) -> Blocks:
        """Return the base's last blocks, from the first store."""
        return self.stores[0].blocks()

    def split(self, *, share: float, seed: int) -> Split:
        """Return the split of the mix: each store split by itself, its repeats for training."""
        train, held_out = [], []
        for place in self._places:
            own = split_marked(place.store, share=share, seed=seed)
            train.append(own.train + place.first_sample)
            if not place.is_repeat:
                held_out.append(own.held_out + place.first_sample)
        return Split(train=np.concatenate(train), held_out=np.concatenate(held_out))

    def epoch_samples(
        self, train: NDArray[np.int64], *, seed: Sequence[int], epoch: int
    ) -> NDArray[np.int64]:
        """Return those of the training samples that an epoch takes: a pure function."""
        kinds, parts = self.sample_kinds[train], []
        for number, place in enumerate(self._places):
            samples = train[kinds == number]
            if place.share < 1:
                # Whole units as far as possible: a part of the samples costs a part of the bytes.
                units = self.sample_starts[samples] // self.unit_tokens
                ranks = np.random.default_rng([*seed, number]).permutation(int(units.max()) + 1)
                laid_out = samples[np.argsort(ranks[units], kind="stable")]
                taken = max(1, round(place.share * len(samples)))
                positions = (epoch * taken + np.arange(taken)) % len(samples)
                samples = np.sort(laid_out[positions])
            parts.append(samples)
        return np.concatenate(parts)

    def _place_of_unit(self, unit: int) -> _Place:
        self._check_unit(unit)
        return [place for place in self._places if place.first_unit <= unit][-1]

    def _place_of_sample(self, sample: int) -> _Place:
        self._check_sample(sample)
        return [place for place in self._places if place.first_sample <= sample][-1]


def open_stores(
    paths: Sequence[str], weights: Sequence[float], *, decoded: DecodedCache | None = None
) -> Store | MixedStore:
    """Open and check one store, or several as a mix; `decoded` keeps what is decoded of them.

    Raises:
        InputError: the stores do not fit together, or the weights do not fit them.
    """
    if not paths:
        raise InputError("store: expected one folder or more, got none")
    if len(set(paths)) != len(paths):
        raise InputError(
            f"store: expected each folder once, got {' '.join(paths)}. Fix: --store-weights with 2 "
            "takes a store twice"
        )
    stores = [Store.open(path, decoded=decoded) for path in paths]
    if len(stores) > 1:
        return MixedStore(stores, weights)
    if weights:
        raise InputError(f"store_weights: expected none for a single store, got {weights}")
    return stores[0]


def _lay_out(stores: Sequence[Store], weights: Sequence[float]) -> list[_Place]:
    places: list[_Place] = []
    first_unit = first_sample = 0
    for store, weight in zip(stores, weights, strict=True):
        for time in range(ceil(weight)):
            share = min(1.0, weight - time)
            places.append(_Place(store, first_unit, first_sample, share, is_repeat=time > 0))
            first_unit += store.num_units
            first_sample += store.num_samples
    return places


def _check_alike(stores: Sequence[Store]) -> None:
    first = _shared_facts(stores[0])
    for store in stores[1:]:
        for name, got in _shared_facts(store).items():
            if got != first[name]:
                raise InputError(
                    f"{store.root}: stores that are mixed have one {name}: expected {first[name]} "
                    f"as {stores[0].root} has, got {got}"
                )


def _shared_facts(store: Store) -> dict[str, Any]:
    """Return what is the same in all stores of a mix."""
    # Facts and the digests of the arrays: equal heads give equal logits.
    files = {path: d for path, d in store.manifest.files.items() if path.startswith("head/")}
    return {
        "width": store.width,
        "taps": sorted(store.taps),
        "dtype": store.dtype,
        "base": f"{store.base.get('id')} (weights {str(store.base.get('weights_sha256'))[:12]}, "
        f"quantization {store.base.get('quantization') or 'none'})",
        "head": digest_of({"head": store.manifest.head, "files": files})[:12],
    }
