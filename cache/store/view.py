"""What training reads: a store, a part of one, or several mixed.

Letters: S samples, D base width.
"""

from collections.abc import Collection, Iterator, Sequence
from operator import index as to_int
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import Head
from carryon.cache.errors import InputError
from carryon.cache.format.framing import Framing, framing_of
from carryon.cache.format.manifest import Manifest
from carryon.cache.store.samples import StoredSample, Unit
from carryon.cache.store.shard_reader import CopyRange

if TYPE_CHECKING:
    from carryon.cache.store.top_blocks import Blocks


class StoreLike(Protocol):
    """Samples and their hidden states, by sample and by unit."""

    name: str
    """Folder, and number of the part; of a mix, the names of its stores."""
    root: Path
    """Folder; of a mix, that of its first store."""
    fingerprint: str
    """SHA-256 of everything that determines the content."""
    samples_digest: str
    """SHA-256 of which samples there are and where they lie; seeds what is drawn at random."""
    base: dict[str, Any]
    """Identity of the base: id, architecture, sizes, digests."""
    framing: Framing
    """How its texts stood before the base."""
    num_blocks: int
    """Last blocks of the base that are stored."""
    taps: list[str]
    width: int
    """D, the base's hidden width."""
    dtype: str
    """Type of the states: bfloat16, float16 or float32."""
    states_dtype: np.dtype[Any]
    """Array type of the states as they are read; uint16 holds the bits of bfloat16."""
    unit_tokens: int
    """Rows of a unit; of a mix, of its longest."""
    num_units: int
    """Units planned."""
    finished_units: Collection[int]
    """Units that can be read."""
    num_samples: int
    """S, samples planned."""
    num_tokens: int
    """Tokens of all samples."""

    @property
    def sample_starts(self) -> NDArray[np.int64]:
        """[S] first row of each sample on the token axis, ascending."""

    @property
    def sample_lengths(self) -> NDArray[np.int32]:
        """[S] tokens of each sample."""

    @property
    def sample_held_out(self) -> NDArray[np.uint8]:
        """[S] 1 where the corpus keeps the sample from training."""

    @property
    def sample_groups(self) -> NDArray[np.uint64]:
        """[S] equal for all samples of one record: turns, pieces, both answers of a pair."""

    @property
    def sample_roles(self) -> NDArray[np.uint8]:
        """[S] 0, or 1 and 2 for the chosen and the rejected answer of a preference pair."""

    @property
    def source_widths(self) -> dict[str, int]:
        """Width of each tap that holds states of another base: none in a plain store."""
        return {}

    def tap_width(self, tap: str) -> int:  # noqa: ARG002 -- differs where bases are joined
        """Return the width of the states at a tap."""
        return self.width

    def tap_dtype(self, tap: str) -> np.dtype[Any]:  # noqa: ARG002
        """Return the array type of the states at a tap."""
        return self.states_dtype

    def row_bytes(self, taps: Sequence[str]) -> int:
        """Return the bytes of a token's states at some taps, as they are read."""
        return sum(self.tap_width(tap) * self.tap_dtype(tap).itemsize for tap in taps)

    def sample_id(self, sample: int) -> str:
        """Return the id of a sample."""

    def index_of(self, sample_id: str) -> int:
        """Return the index of the sample with this id.

        Raises:
            InputError: no sample has it.
        """

    def read_unit(self, unit: int, *, taps: Sequence[str] | None = None) -> Unit:
        """Read one whole unit.

        Args:
            unit: 0 to `num_units` - 1.
            taps: those to read. Default: all.

        Raises:
            InputError: no such unit or tap.
            UnfinishedStoreError: the unit has no receipt.
            DamagedStoreError: a checksum or a size does not match; names tap and chunk.
        """

    def read_sample(
        self,
        sample: int | str,
        *,
        taps: Sequence[str] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> StoredSample:
        """Read tokens `start` to `stop` of one sample; only the chunks they lie in are decoded.

        Args:
            sample: index or id.
            taps: those to read. Default: all.
            start: first token.
            stop: token after the last one. Default: the sample's end.

        Raises:
            InputError: no such sample, token or tap.
            UnfinishedStoreError, DamagedStoreError: as `read_unit`.
        """

    def copy_states(self, unit: int, tap: str, moves: Sequence[CopyRange]) -> None:
        """Decode rows of a unit's states at a tap straight to where they are wanted.

        Args:
            unit: 0 to `num_units` - 1.
            tap: of the store.
            moves: which rows of the unit go where; the arrays are of `states_dtype`.

        Raises:
            InputError, UnfinishedStoreError, DamagedStoreError: as `read_unit`; the arrays then
                hold anything.
        """

    def head(self, *, is_mapped: bool = False) -> Head:
        """Return the base's frozen head and final norm; mapped, in a file (see `map_head`)."""

    def blocks(self) -> "Blocks":
        """Return the base's last blocks; imports torch.

        Raises:
            InputError: none are stored.
        """

    def __repr__(self) -> str:
        """Return path, size, states and base."""
        return (
            f"<{type(self).__name__} {self.name!r}: {self.num_samples:,} samples, "
            f"{self.num_tokens:,} tokens in {self.num_units:,} units; taps {' '.join(self.taps)}, "
            f"{self.width} x {self.dtype}; base {self.base.get('id')}>"
        )

    def __len__(self) -> int:
        """Return the number of samples planned."""
        return self.num_samples

    def __getitem__(self, key: SupportsIndex | str) -> StoredSample:
        """Read one sample, by index (also from the end) or by id.

        Raises:
            IndexError: no sample has this index.
            InputError: no sample has this id.
        """
        if isinstance(key, str):
            return self.read_sample(key)
        index, num_samples = to_int(key), self.num_samples
        if not -num_samples <= index < num_samples:
            raise IndexError(
                f"{self.root}: expected a sample from {-num_samples} to {num_samples - 1}, "
                f"got {index}"
            )
        return self.read_sample(index % num_samples)

    def __iter__(self) -> Iterator[StoredSample]:
        """Yield the samples of all finished units in order; each unit is read once.

        A sample's arrays are views of its unit's: copy those that you keep.
        """
        for unit in self.iter_units():
            for sample in unit.samples:
                yield unit.sample(sample, sample_id=self.sample_id(sample))

    def iter_units(self, *, taps: Sequence[str] | None = None) -> Iterator[Unit]:
        """Yield the finished units in order."""
        for unit in sorted(self.finished_units):
            yield self.read_unit(unit, taps=taps)

    def unit_of(self, sample: int) -> int:
        """Return the unit that holds a sample."""
        return int(self.sample_starts[sample]) // self.unit_tokens

    def unit_samples(self, unit: int) -> range:
        """Return the indices of a unit's samples."""
        bounds = [unit * self.unit_tokens, (unit + 1) * self.unit_tokens]
        first, stop = np.searchsorted(self.sample_starts, bounds).tolist()
        return range(first, stop)

    def _describe(self, root: Path, manifest: Manifest) -> None:
        """Set the attributes that the manifest of a store determines."""
        self.name, self.root = str(root), root
        self.fingerprint, self.samples_digest = manifest.fingerprint, manifest.samples_digest
        self.base, self.num_blocks = manifest.base, manifest.num_blocks
        self.framing = framing_of(manifest)
        self.taps, self.width = manifest.taps, manifest.width
        self.dtype, self.states_dtype = manifest.settings["dtype"], manifest.states_dtype
        self.unit_tokens = manifest.unit_tokens
        self.num_units, self.num_samples = manifest.num_units, manifest.num_samples
        self.num_tokens = manifest.num_tokens

    def _check_sample(self, sample: int) -> None:
        if not 0 <= sample < self.num_samples:
            raise InputError(
                f"{self.root}: expected a sample from 0 to {self.num_samples - 1}, got {sample}"
            )

    def _check_unit(self, unit: int) -> None:
        if not 0 <= unit < self.num_units:
            raise InputError(
                f"{self.root}: expected a unit from 0 to {self.num_units - 1}, got {unit}"
            )
