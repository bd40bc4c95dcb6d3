"""Reading a store: open, check, units and samples as numpy arrays.

Opening reads a few small files, whatever the number of tokens: the manifest, the digests of the
array documents, one listing of the receipts, the probe. A finished unit is read whole with one
read per tap and decoded straight into place. Every chunk is held against its checksum and against
the one its receipt names, every small file against its SHA-256, the receipt against the manifest:
a read returns what was written or raises, also of sound files from elsewhere. Needs numpy and
numcodecs only; neither torch nor transformers is imported. Letters: R rows of a unit, D base
width, S samples, n samples of a unit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import Head, widen
from carryon.cache.errors import DamagedStoreError, InputError, UnfinishedStoreError
from carryon.cache.format.arrays import read_array
from carryon.cache.format.head_arrays import read_head
from carryon.cache.format.manifest import Manifest, read_manifest, sha256_hex
from carryon.cache.format.probe import check_head, check_states, read_probe
from carryon.cache.format.receipt import Receipt, read_receipt, units_with_receipt
from carryon.cache.format.zarr_metadata import TABLE_ROWS
from carryon.cache.store.shard_reader import CopyRange, UnitFiles


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRows:
    """Consecutive tokens of one sample."""

    sample: int
    tokens: NDArray[np.int32]
    """[T] token ids."""
    loss_mask: NDArray[np.uint8]
    """[T]"""
    char_end: NDArray[np.int32]
    """[T]"""
    hidden: dict[str, NDArray[Any]]
    """[T, D] for each tap asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """One unit, whole. The rows after its last sample belong to no sample."""

    unit: int
    samples: range
    """Indices of its samples."""
    starts: NDArray[np.int64]
    """[n] first row of each sample, counted within the unit."""
    lengths: NDArray[np.int32]
    """[n] tokens of each sample."""
    tokens: NDArray[np.int32]
    """[R] token ids."""
    loss_mask: NDArray[np.uint8]
    """[R] 1 where the token is a training target."""
    char_end: NDArray[np.int32]
    """[R] end of the token in the sample's text, in characters."""
    hidden: dict[str, NDArray[Any]]
    """[R, D] for each tap: uint16 bits of bfloat16, or float16, or float32."""

    def rows_of(self, sample: int) -> slice:
        """Return the rows of a sample (index as in `samples`) within this unit."""
        position = sample - self.samples.start
        start = int(self.starts[position])
        return slice(start, start + int(self.lengths[position]))

    def sample(self, sample: int) -> SampleRows:
        """Return a sample (index as in `samples`) as views of this unit's arrays."""
        rows = self.rows_of(sample)
        return SampleRows(
            sample=sample,
            tokens=self.tokens[rows],
            loss_mask=self.loss_mask[rows],
            char_end=self.char_end[rows],
            hidden={tap: states[rows] for tap, states in self.hidden.items()},
        )


class Store:
    """A store opened for reading; make one with `Store.open`."""

    def __init__(self, root: Path, manifest: Manifest, finished: set[int]) -> None:
        """Keep what `open` has checked."""
        self.root = root
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.samples_digest = manifest.samples_digest
        self.finished_units = finished
        self._files = UnitFiles(root, manifest)

    @classmethod
    def open(cls, path: str | Path, *, allow_unfinished: bool = False) -> "Store":
        """Open and check the store at `path`.

        Args:
            path: folder of the store.
            allow_unfinished: also open a store whose extraction has not ended; only its finished
                units can be read.

        Raises:
            MissingError: there is no store.
            UnfinishedStoreError: units are missing, and `allow_unfinished` is not set.
            DamagedStoreError: documents were changed, or head, norm and states do not belong
                together (the probe).
        """
        root = Path(path)
        manifest = read_manifest(root)
        try:
            _check_documents(root, manifest)
        except DamagedStoreError:
            before, manifest = manifest, read_manifest(root)
            if manifest == before:
                raise
            _check_documents(root, manifest)  # samples were appended between the two
        finished = units_with_receipt(root) & set(range(manifest.num_units))
        missing = manifest.num_units - len(finished)
        if missing and not allow_unfinished:
            raise UnfinishedStoreError(
                f"{root}: {missing} of {manifest.num_units} units are not extracted: run the same "
                "carryon extract again, or open the finished part with allow_unfinished"
            )
        store = cls(root, manifest, finished)
        store._check_probe()
        return store

    @property
    def taps(self) -> list[str]:
        """Taps of the store."""
        return self.manifest.taps

    @property
    def width(self) -> int:
        """D, the base's hidden width."""
        return self.manifest.width

    @property
    def states_dtype(self) -> np.dtype[Any]:
        """Type of stored states as they are read: uint16 stands for the bits of bfloat16."""
        return self.manifest.states_dtype

    @property
    def num_units(self) -> int:
        """Units planned; `finished_units` says which of them are there."""
        return self.manifest.num_units

    @property
    def num_samples(self) -> int:
        """S, samples planned."""
        return self.manifest.num_samples

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples."""
        return self.manifest.num_tokens

    @cached_property
    def sample_starts(self) -> NDArray[np.int64]:
        """[S] first row of each sample on the token axis, ascending."""
        return self._table("samples/start")

    @cached_property
    def sample_lengths(self) -> NDArray[np.int32]:
        """[S] tokens of each sample."""
        return self._table("samples/length")

    @cached_property
    def sample_held_out(self) -> NDArray[np.uint8]:
        """[S] 1 where the corpus keeps the sample from training."""
        return self._table("samples/held_out")

    def sample_id(self, sample: int) -> str:
        """Return the id of a sample."""
        self._check_sample(sample)
        row = self._table("samples/id", first=sample, stop=sample + 1)[0]
        return bytes(row.tobytes()).rstrip(b"\0").decode()

    def index_of(self, sample_id: str) -> int:
        """Return the index of the sample with this id.

        Raises:
            InputError: there is none.
        """
        wanted = sample_id.encode()
        for first in range(0, self.num_samples, TABLE_ROWS):
            stop = min(first + TABLE_ROWS, self.num_samples)
            rows = self._table("samples/id", first=first, stop=stop)
            if len(wanted) > rows.shape[1]:
                break
            padded = np.frombuffer(wanted.ljust(rows.shape[1], b"\0"), dtype=np.uint8)
            found = np.flatnonzero((rows == padded).all(axis=1))
            if len(found):
                return first + int(found[0])
        raise InputError(f"{self.root}: no sample with the id {sample_id!r}")

    def unit_of(self, sample: int) -> int:
        """Return the unit that holds a sample."""
        return int(self.sample_starts[sample]) // self.manifest.unit_tokens

    def unit_samples(self, unit: int) -> range:
        """Return the indices of a unit's samples."""
        size = self.manifest.unit_tokens
        bounds = np.searchsorted(self.sample_starts, [unit * size, (unit + 1) * size])
        return range(int(bounds[0]), int(bounds[1]))

    def receipt(self, unit: int) -> Receipt:
        """Return the receipt of a unit."""
        return read_receipt(self.root, self.manifest, unit)

    def read_unit(self, unit: int, *, taps: Sequence[str] | None = None) -> Unit:
        """Read one unit whole.

        Args:
            unit: 0 to `num_units` - 1.
            taps: those wanted; others are not read. Default: all.

        Raises:
            InputError: no such unit or tap.
            UnfinishedStoreError: the unit has no receipt.
            DamagedStoreError: a checksum or a size does not fit; names tap and chunk.
        """
        wanted = self._known_taps(taps)
        self._check_unit(unit)
        files = self._files
        receipt = self.receipt(unit)
        samples = self.unit_samples(unit)
        span = slice(samples.start, samples.stop)
        all_rows = slice(0, self.manifest.unit_tokens)
        return Unit(
            unit=unit,
            samples=samples,
            starts=self.sample_starts[span] - unit * self.manifest.unit_tokens,
            lengths=self.sample_lengths[span],
            tokens=files.rows("tokens", unit, receipt),
            loss_mask=files.rows("loss_mask", unit, receipt),
            char_end=files.rows("char_end", unit, receipt),
            hidden={tap: files.states(tap, unit, all_rows, receipt) for tap in wanted},
        )

    def copy_states(self, unit: int, tap: str, moves: Sequence[CopyRange]) -> None:
        """Decode rows of a unit's states at a tap straight to where they are wanted.

        Args:
            unit: 0 to `num_units` - 1.
            tap: of the store.
            moves: which rows of the unit go where; the arrays are of `states_dtype`.

        Raises:
            InputError, UnfinishedStoreError, DamagedStoreError: as `read_unit`; what was written
                till then is of no use.
        """
        self._known_taps([tap])
        self._check_unit(unit)
        self._files.copy_states(tap, unit, moves, self.receipt(unit))

    def read_sample(
        self,
        sample: int | str,
        *,
        taps: Sequence[str] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> SampleRows:
        """Read tokens `start` to `stop` of one sample; only the chunks they lie in are decoded.

        Args:
            sample: index or id.
            taps: those wanted. Default: all.
            start: first token.
            stop: token after the last one. Default: the sample's end.
        """
        wanted = self._known_taps(taps)
        index = self.index_of(sample) if isinstance(sample, str) else sample
        self._check_sample(index)
        length = int(self.sample_lengths[index])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise InputError(
                f"sample {index}: expected tokens between 0 and {length}, got {start} to {stop}"
            )
        unit = self.unit_of(index)
        self._check_unit(unit)
        files, receipt = self._files, self.receipt(unit)
        first = int(self.sample_starts[index]) - unit * self.manifest.unit_tokens
        rows = slice(first + start, first + stop)
        return SampleRows(
            sample=index,
            tokens=files.rows("tokens", unit, receipt)[rows],
            loss_mask=files.rows("loss_mask", unit, receipt)[rows],
            char_end=files.rows("char_end", unit, receipt)[rows],
            hidden={tap: files.states(tap, unit, rows, receipt) for tap in wanted},
        )

    def iter_units(self, *, taps: Sequence[str] | None = None) -> Iterator[Unit]:
        """Yield the finished units in order."""
        for unit in sorted(self.finished_units):
            yield self.read_unit(unit, taps=taps)

    def head(self) -> Head:
        """Return the base's frozen head and final norm."""
        return read_head(self.root, self.manifest)

    def _table(self, name: str, *, first: int = 0, stop: int | None = None) -> NDArray[Any]:
        stop = self.num_samples if stop is None else stop
        try:
            return read_array(self.root, name, first=first, stop=stop, digests=self.manifest.files)
        except DamagedStoreError:
            now = read_manifest(self.root)
            if now == self.manifest or not now.is_stage_of(self.manifest):
                raise
            # Samples were appended since: these rows are the same, their file is another.
            return read_array(self.root, name, first=first, stop=stop, digests=now.files)

    def _known_taps(self, taps: Sequence[str] | None) -> list[str]:
        wanted = self.taps if taps is None else list(taps)
        for tap in wanted:
            if tap not in self.taps:
                raise InputError(
                    f"{self.root}: tap {tap!r} was not stored: it has {', '.join(self.taps)}"
                )
        return wanted

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

    def _check_probe(self) -> None:
        probe, name = read_probe(self.root, self.manifest), str(self.root)
        check_head(probe, read_head(self.root, self.manifest, tokens=probe.top_ids), name=name)
        unit = int(probe.rows[0]) // self.manifest.unit_tokens
        if unit not in self.finished_units:
            return
        receipt = self.receipt(unit)
        within = probe.rows - unit * self.manifest.unit_tokens
        rows = slice(int(within.min()), int(within.max()) + 1)
        for tap in self.taps:
            stored = self._files.states(tap, unit, rows, receipt)[within - rows.start]
            error = self.manifest.profile_error.get(tap, {}).get("channel_relative_error", 0.0)
            check_states(probe, widen(stored), tap=tap, profile_error=error, name=name)


def _check_documents(root: Path, manifest: Manifest) -> None:
    """Check the documents of groups and arrays against the manifest."""
    for path, digests in manifest.files.items():
        if path.endswith("/zarr.json"):
            try:
                found = sha256_hex((root / path).read_bytes())
            except FileNotFoundError:
                found = "no file"
            if found not in digests:
                raise DamagedStoreError(
                    f"{root / path}: not as it was written: expected SHA-256 {digests[0]}, "
                    f"got {found}: run carryon repair"
                )
