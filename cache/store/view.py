"""A part of a store: the samples of one extraction into it, read as a store of their own.

`STORE#2` names the second part of the store at STORE, which is the first that was appended. A part
has the fingerprint that it would have as a store of its own, whatever is appended after it: so
what is trained on a part can be trained again, to the same bits, when the store has grown.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import InputError, UnfinishedStoreError
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.receipt import Receipt
from carryon.cache.store.reader import SampleRows, Store, Unit
from carryon.cache.store.shard_reader import CopyRange


class StorePart(Store):
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
        manifest = manifest_of_part(whole.manifest, number, name=str(whole.root))
        part = whole.manifest.parts[number - 1]
        finished = {unit - part.first_unit for unit in whole.finished_units}
        super().__init__(whole.root, manifest, finished & set(range(part.num_units)))
        missing = part.num_units - len(self.finished_units)
        if missing:
            raise UnfinishedStoreError(
                f"{whole.root}: {missing} of {part.num_units} units of part {number} are not "
                "extracted: run the same carryon extract again"
            )
        self._whole = whole
        self._first_unit, self._first_sample = part.first_unit, part.first_sample

    @cached_property
    def sample_starts(self) -> NDArray[np.int64]:
        """[S] first row of each sample, counted from the part's first."""
        return self._table("samples/start") - self._first_unit * self.manifest.unit_tokens

    def receipt(self, unit: int) -> Receipt:
        """Return the receipt of a unit."""
        self._check_unit(unit)
        return self._whole.receipt(self._first_unit + unit)

    def read_unit(self, unit: int, *, taps: Sequence[str] | None = None) -> Unit:
        """Read one unit whole."""
        self._check_unit(unit)
        found = self._whole.read_unit(self._first_unit + unit, taps=taps)
        samples = range(
            found.samples.start - self._first_sample, found.samples.stop - self._first_sample
        )
        return replace(found, unit=unit, samples=samples)

    def copy_states(self, unit: int, tap: str, moves: Sequence[CopyRange]) -> None:
        """Decode rows of a unit's states at a tap straight to where they are wanted."""
        self._check_unit(unit)
        self._whole.copy_states(self._first_unit + unit, tap, moves)

    def read_sample(
        self,
        sample: int | str,
        *,
        taps: Sequence[str] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> SampleRows:
        """Read tokens of one sample."""
        index = self.index_of(sample) if isinstance(sample, str) else sample
        self._check_sample(index)
        found = self._whole.read_sample(
            self._first_sample + index, taps=taps, start=start, stop=stop
        )
        return replace(found, sample=index)

    def _table(self, name: str, *, first: int = 0, stop: int | None = None) -> NDArray[Any]:
        stop = self.num_samples if stop is None else stop
        shift = self._first_sample
        return self._whole._table(name, first=shift + first, stop=shift + stop)


def open_store(name: str) -> Store:
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
    """Return the folder that the name of a store or of its part means, and the part's number."""
    found = re.fullmatch(r"(.+)#(\d+)", name)
    if found is None or Path(name).exists():
        return Path(name), None
    return Path(found[1]), int(found[2])


def manifest_of_part(manifest: Manifest, number: int, *, name: str) -> Manifest:
    """Return the manifest that a part (counted from 1) would have as a store of its own.

    Raises:
        InputError: there is no such part.
    """
    if not 1 <= number <= len(manifest.parts):
        raise InputError(f"{name}: expected a part from 1 to {len(manifest.parts)}, got {number}")
    part = manifest.parts[number - 1]
    return replace(manifest, parts=[replace(part, first_unit=0, first_sample=0)])
