"""Parts of a store: the samples of one extraction into it, read as a separate store.

`STORE#2` names the second part of the store at STORE, the first that was appended. A part has the
fingerprint of a store with only its samples, whatever is appended later: training on it again
gives the same bits.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import Head
from carryon.cache.errors import InputError, UnfinishedStoreError
from carryon.cache.format.manifest import Manifest
from carryon.cache.store.reader import Store
from carryon.cache.store.samples import StoredSample, Unit
from carryon.cache.store.shard_reader import CopyRange
from carryon.cache.store.view import StoreLike

if TYPE_CHECKING:
    from carryon.cache.store.top_blocks import Blocks


class StorePart(StoreLike):
    """One part of a store; make one with `open_store`."""

    def __init__(self, whole: Store, number: int) -> None:
        """Take a part of an opened store.

        Args:
            whole: may have unfinished units in other parts.
            number: of the part, counted from 1.

        Raises:
            InputError: there is no such part.
            UnfinishedStoreError: it has units that are not extracted.
        """
        self.manifest = manifest_of_part(whole.manifest, number, name=str(whole.root))
        self._describe(whole.root, self.manifest)
        self._whole = whole
        part = whole.manifest.parts[number - 1]
        self._first_unit, self._first_sample = part.first_unit, part.first_sample
        self.finished_units = range(part.num_units)
        units = {self._first_unit + unit for unit in self.finished_units}
        missing = len(units - whole.finished_units)
        if missing:
            raise UnfinishedStoreError(
                f"{whole.root}: {missing} of {part.num_units} units of part {number} are not "
                "extracted: run the same carryon extract again"
            )

    @cached_property
    def sample_starts(self) -> NDArray[np.int64]:
        """[S] first row of each sample, counted from the part's first."""
        first_row = self._first_unit * self.unit_tokens
        return self._whole.sample_starts[self._samples] - first_row

    @cached_property
    def sample_lengths(self) -> NDArray[np.int32]:
        """[S] tokens of each sample."""
        return self._whole.sample_lengths[self._samples]

    @cached_property
    def sample_held_out(self) -> NDArray[np.uint8]:
        """[S] 1 where the corpus keeps the sample from training."""
        return self._whole.sample_held_out[self._samples]

    def sample_id(self, sample: int) -> str:
        """Return the id of a sample."""
        self._check_sample(sample)
        return self._whole.sample_id(self._first_sample + sample)

    def index_of(self, sample_id: str) -> int:
        """Return the index, within the part, of the sample with this id."""
        index = self._whole.index_of(sample_id) - self._first_sample
        if not 0 <= index < self.num_samples:
            raise InputError(f"{self.root}: the sample {sample_id!r} is in another part")
        return index

    def read_unit(self, unit: int, *, taps: Sequence[str] | None = None) -> Unit:
        """Read one whole unit."""
        self._check_unit(unit)
        whole = self._whole.read_unit(self._first_unit + unit, taps=taps)
        return whole.shifted(units=-self._first_unit, samples=-self._first_sample)

    def read_sample(self, sample: int | str, **options: Any) -> StoredSample:  # noqa: ANN401
        """Read tokens of one sample, with the options of `StoreLike.read_sample`."""
        index = self.index_of(sample) if isinstance(sample, str) else sample
        self._check_sample(index)
        return replace(self._whole.read_sample(self._first_sample + index, **options), index=index)

    def copy_states(self, unit: int, tap: str, moves: Sequence[CopyRange]) -> None:
        """Decode rows of a unit's states at a tap straight to where they are wanted."""
        self._check_unit(unit)
        self._whole.copy_states(self._first_unit + unit, tap, moves)

    def head(self, *, is_mapped: bool = False) -> Head:
        """Return the base's frozen head and final norm."""
        return self._whole.head(is_mapped=is_mapped)

    def blocks(self) -> "Blocks":
        """Return the base's last blocks."""
        return self._whole.blocks()

    @property
    def _samples(self) -> slice:
        return slice(self._first_sample, self._first_sample + self.num_samples)


def open_store(name: str) -> Store | StorePart:
    """Open and check a store, or the part of one that `STORE#NUMBER` names.

    Raises:
        MissingError, DamagedStoreError: as `Store.open`.
        UnfinishedStoreError: units are missing; of a part, units of that part.
        InputError: there is no such part.
    """
    folder, number = split_name(name)
    if number is None:
        return Store.open(folder)
    return StorePart(Store.open(folder, allow_unfinished=True), number)


def split_name(name: str) -> tuple[Path, int | None]:
    """Return folder and part number of `STORE` or `STORE#NUMBER`."""
    match = re.fullmatch(r"(.+)#(\d+)", name)
    if match is None or Path(name).exists():
        return Path(name), None
    return Path(match[1]), int(match[2])


def manifest_of_part(manifest: Manifest, number: int, *, name: str) -> Manifest:
    """Return the manifest of a store with only the samples of a part, counted from 1.

    Raises:
        InputError: there is no such part.
    """
    if not 1 <= number <= len(manifest.parts):
        raise InputError(f"{name}: expected a part from 1 to {len(manifest.parts)}, got {number}")
    part = manifest.parts[number - 1]
    return replace(manifest, parts=[replace(part, first_unit=0, first_sample=0)])
