"""Opening and reading a store, or a part of it: numpy arrays or torch tensors.

Opening reads a few small files, whatever the number of tokens: the manifest, the digests of the
array documents, one listing of the receipts, the probe. A unit is read with one read per tap, and
each chunk is decoded into place. A read returns what was written, or raises: every chunk is
compared with its checksum and with the receipt, every small file with its SHA-256. Needs numpy,
numcodecs and google-crc32c; torch, transformers and zarr are imported only by `as_torch`,
`blocks` and `as_zarr`. Letters: R rows of a unit, D base width, S samples.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import Head, widen
from carryon.cache.errors import DamagedStoreError, InputError, UnfinishedStoreError
from carryon.cache.files.regular import read_below, stat_below
from carryon.cache.format.arrays import check_unit_document, read_array
from carryon.cache.format.head_arrays import map_head, read_head
from carryon.cache.format.manifest import Manifest, read_manifest, sha256_hex
from carryon.cache.format.probe import check_head, check_states, read_probe
from carryon.cache.format.receipt import Receipt, read_receipt, units_with_receipt
from carryon.cache.format.schema import MAX_DOCUMENT_BYTES
from carryon.cache.format.zarr_metadata import ROW_ARRAYS, TABLE_ROWS, receipt_path
from carryon.cache.store.decoded_cache import DecodedCache
from carryon.cache.store.samples import StoredSample, Unit, check_places
from carryon.cache.store.shard_reader import CopyRange, UnitFiles
from carryon.cache.store.view import StoreLike

if TYPE_CHECKING:
    import zarr

    from carryon.cache.store.top_blocks import Blocks

_OVER_UNITS = ("hidden/", "scale/token/", "scale/channel/")
_RECEIPTS = 64
"""Receipts that are kept parsed: each tap of each unit of a few windows asks for one."""


class Store(StoreLike):
    """A store, or a part of one, opened for reading; make one with `Store.open`.

    Example:
        store = Store.open("store")
        for sample in store: ...        # all samples in order
        store[0], store[-1], store["chat-7"]
    """

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        with_receipt: set[int],
        *,
        part: int | None = None,
        as_torch: bool = False,
        decoded: DecodedCache | None = None,
    ) -> None:
        """Keep what `open` has checked.

        Args:
            root: folder of the store.
            manifest: of the whole store.
            with_receipt: units of the whole store that are finished.
            part: number of the part to read, counted from 1. None: the whole store.
            as_torch: read torch tensors.
            decoded: keeps decoded states. None: nothing does.
        """
        self._whole = manifest
        self.manifest = manifest if part is None else manifest.of_part(part, name=str(root))
        self._describe(root, self.manifest)
        self.name = str(root) if part is None else f"{root}#{part}"
        first = manifest.parts[(part or 1) - 1]
        self._first_unit, self._first_sample = first.first_unit, first.first_sample
        numbers = {number - self._first_unit for number in with_receipt}
        self.finished_units = {unit for unit in numbers if 0 <= unit < self.num_units}
        self._as_torch = as_torch
        self.decoded = decoded
        self._files = UnitFiles(root, manifest)
        self._receipts: Callable[[int, tuple[int, ...]], Receipt] = lru_cache(_RECEIPTS)(
            partial(_read_receipt, root, manifest)
        )
        self._ids: tuple[int, NDArray[np.uint8]] | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        allow_unfinished: bool = False,
        as_torch: bool = False,
        allow_aligned: bool = False,
        decoded: DecodedCache | None = None,
    ) -> "Store":
        """Open and check the store at `path`.

        Args:
            path: folder of the store. `FOLDER#2` reads only the samples of its second part, the
                first that was appended. A part has the fingerprint of a store with only its
                samples: training on it again gives the same bits after the store has grown.
            allow_unfinished: also open a store whose extraction has not ended; only its finished
                units can be read.
            as_torch: read units and samples as torch tensors, bfloat16 states as such.
            allow_aligned: also open a store that is aligned to another one, whose tokens are not
                those of its head.
            decoded: folder of decoded states that `copy_states` reads from and adds to.

        Raises:
            MissingError: there is no store.
            InputError: the store has no such part, or is aligned to another one.
            UnfinishedStoreError: units are missing, and `allow_unfinished` is not set.
            DamagedStoreError: documents were changed, or head, norm and states do not belong
                together (the probe).
        """
        root, part = split_name(str(path))
        manifest = read_manifest(root)
        if manifest.alignment and not allow_aligned:
            raise InputError(
                f"{path}: expected a store of its own, got one that is aligned to the store "
                f"{manifest.alignment['anchor'][:12]} of {manifest.alignment['anchor_base']}, "
                "whose tokens it holds. Fix: give the anchor with --store"
            )
        try:
            _check_documents(root, manifest)
        except DamagedStoreError:
            before, manifest = manifest, read_manifest(root)
            if manifest == before:
                raise
            _check_documents(root, manifest)  # samples were appended between the two
        with_receipt = units_with_receipt(root)
        store = cls(root, manifest, with_receipt, part=part, as_torch=as_torch, decoded=decoded)
        missing = store.num_units - len(store.finished_units)
        if missing and not allow_unfinished:
            raise UnfinishedStoreError(
                f"{path}: {missing} of {store.num_units} units are not extracted: run the same "
                "carryon extract again, or open the finished part with allow_unfinished"
            )
        store._check_probe(with_receipt)
        return store

    @cached_property
    def sample_starts(self) -> NDArray[np.int64]:
        """[S] first row of each sample on the token axis, ascending."""
        return self._read_table("samples/start") - self._first_unit * self.unit_tokens

    @cached_property
    def sample_lengths(self) -> NDArray[np.int32]:
        """[S] tokens of each sample."""
        lengths = self._read_table("samples/length")
        check_places(self.sample_starts, lengths, self.manifest, name=self.name)
        return lengths

    @cached_property
    def sample_held_out(self) -> NDArray[np.uint8]:
        """[S] 1 where the corpus keeps the sample from training."""
        return self._read_table("samples/held_out")

    @cached_property
    def sample_groups(self) -> NDArray[np.uint64]:
        """[S] equal for all samples of one record; all different in stores that keep none."""
        if not self._has_array("samples/group"):
            return np.arange(self.num_samples, dtype=np.uint64)
        return self._read_table("samples/group")

    @cached_property
    def sample_roles(self) -> NDArray[np.uint8]:
        """[S] 0, or 1 and 2 for the chosen and the rejected answer of a preference pair."""
        if not self._has_array("samples/role"):
            return np.zeros(self.num_samples, dtype=np.uint8)
        return self._read_table("samples/role")

    def sample_id(self, sample: int) -> str:
        """Return the id of a sample."""
        self._check_sample(sample)
        row = self._id_rows(sample // TABLE_ROWS)[sample % TABLE_ROWS]
        try:
            return bytes(row.tobytes()).rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise DamagedStoreError(f"{self.root}: the id of sample {sample} is no text") from error

    def index_of(self, sample_id: str) -> int:
        """Return the index of the sample with this id, from a scan of all ids."""
        wanted = sample_id.encode()
        for chunk in range(-(-self.num_samples // TABLE_ROWS)):
            rows = self._id_rows(chunk)
            if len(wanted) > rows.shape[1]:
                break
            padded = np.frombuffer(wanted.ljust(rows.shape[1], b"\0"), dtype=np.uint8)
            matches = np.flatnonzero((rows == padded).all(axis=1))
            if len(matches):
                return chunk * TABLE_ROWS + int(matches[0])
        raise InputError(f"{self.root}: no sample with the id {sample_id!r}")

    def check_tables(self) -> None:
        """Read all tables of samples.

        Raises:
            DamagedStoreError: one is missing or is not what was written, samples do not lie one
                after another, or the id of the first of many is no text.
        """
        tables = (self.sample_lengths, self.sample_held_out, self.sample_groups, self.sample_roles)
        if any(len(table) != self.num_samples for table in tables):
            raise DamagedStoreError(f"{self.root}: samples: expected {self.num_samples} rows")
        for first in range(0, self.num_samples, TABLE_ROWS):
            self.sample_id(first)

    def receipt(self, unit: int) -> Receipt:
        """Return the receipt of a unit; it is parsed again only when its file has changed.

        Raises:
            UnfinishedStoreError: the unit has no receipt.
            DamagedStoreError: the receipt was changed, or is another unit's or store's.
        """
        self._check_unit(unit)
        number = self._first_unit + unit
        try:
            stat = stat_below(self.root, receipt_path(number))
        except FileNotFoundError:
            return read_receipt(self.root, self._whole, number)
        return self._receipts(number, (stat.st_mtime_ns, stat.st_ino, stat.st_size))

    def read_unit(self, unit: int, *, taps: Sequence[str] | None = None) -> Unit:
        """Read one whole unit."""
        self._check_unit(unit)
        samples = self.unit_samples(unit)
        span = slice(samples.start, samples.stop)
        read = Unit(
            unit=unit,
            samples=samples,
            starts=self.sample_starts[span] - unit * self.unit_tokens,
            lengths=self.sample_lengths[span],
            **self._read_rows(unit, slice(0, self.unit_tokens), taps),
        )
        return read.as_torch() if self._as_torch else read

    def read_sample(
        self,
        sample: int | str,
        *,
        taps: Sequence[str] | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> StoredSample:
        """Read tokens `start` to `stop` of one sample; only the chunks they lie in are decoded."""
        index = self.index_of(sample) if isinstance(sample, str) else sample
        self._check_sample(index)
        length = int(self.sample_lengths[index])
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise InputError(
                f"sample {index}: expected tokens between 0 and {length}, got {start} to {stop}"
            )
        unit, first = divmod(int(self.sample_starts[index]), self.unit_tokens)
        rows = self._read_rows(unit, slice(first + start, first + stop), taps)
        read = StoredSample(index=index, id=self.sample_id(index), **rows)
        return read.as_torch() if self._as_torch else read

    def _read_rows(self, unit: int, rows: slice, taps: Sequence[str] | None) -> dict[str, Any]:
        taps = self.taps if taps is None else taps
        self._check_taps(taps)
        number, receipt = self._first_unit + unit, self.receipt(unit)
        read: dict[str, Any] = {
            name: self._files.rows(name, number, receipt)[rows] for name in ROW_ARRAYS
        }
        read["hidden"] = {tap: self._files.states(tap, number, rows, receipt) for tap in taps}
        return read

    def copy_states(self, unit: int, tap: str, moves: Sequence[CopyRange]) -> None:
        """Decode rows of a unit's states at a tap straight to where they are wanted."""
        self._check_taps([tap])
        number, receipt = self._first_unit + unit, self.receipt(unit)
        if self.decoded is None or not self.decoded.copy_states(
            self._files, tap, number, moves, receipt
        ):
            self._files.copy_states(tap, number, moves, receipt)

    def head(self, *, is_mapped: bool = False) -> Head:
        """Return the base's frozen head and final norm."""
        return (map_head if is_mapped else read_head)(self.root, self._whole)

    def blocks(self) -> "Blocks":
        """Return the base's last blocks; imports torch."""
        from carryon.cache.store.top_blocks import load_blocks

        return load_blocks(self.root, self._whole)

    def as_zarr(self) -> "zarr.Group":
        """Return the store as a read-only group of zarr-python.

        zarr-python compares checksums of chunks, but reads a missing file as zeros, and states
        in bfloat16 as their bits in uint16. docs/store-format.md lists the arrays.
        """
        import zarr

        return zarr.open_group(self.root, mode="r")

    def _has_array(self, name: str) -> bool:
        """Return whether the store keeps this array; stores from before it was added do not."""
        return f"{name}/zarr.json" in self._whole.files

    def _read_table(self, name: str, *, first: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return rows `first` to `stop` (default: all) of a table of samples."""
        first += self._first_sample
        stop = self._first_sample + (self.num_samples if stop is None else stop)
        read = partial(read_array, self.root, name, first=first, stop=stop)
        try:
            return read(digests=self._whole.files)
        except DamagedStoreError:
            now = read_manifest(self.root)
            if now == self._whole or not now.is_stage_of(self._whole):
                raise
            return read(digests=now.files)  # samples were appended since; these rows are the same

    def _id_rows(self, chunk: int) -> NDArray[np.uint8]:
        """Return the ids of TABLE_ROWS samples; the last ones read are kept."""
        if self._ids is None or self._ids[0] != chunk:
            first = chunk * TABLE_ROWS
            stop = min(first + TABLE_ROWS, self.num_samples)
            self._ids = chunk, self._read_table("samples/id", first=first, stop=stop)
        return self._ids[1]

    def _check_taps(self, taps: Sequence[str]) -> None:
        for tap in taps:
            if tap not in self.taps:
                raise InputError(
                    f"{self.root}: tap {tap!r} was not stored: it has {', '.join(self.taps)}"
                )

    def _check_probe(self, with_receipt: set[int]) -> None:
        manifest, name = self._whole, str(self.root)
        probe = read_probe(self.root, manifest)
        check_head(probe, read_head(self.root, manifest, tokens=probe.top_ids), name=name)
        unit = int(probe.rows[0]) // self.unit_tokens
        if unit not in with_receipt:
            return
        receipt = read_receipt(self.root, manifest, unit)
        within = probe.rows - unit * self.unit_tokens
        rows = slice(int(within.min()), int(within.max()) + 1)
        for tap in self.taps:
            stored = self._files.states(tap, unit, rows, receipt)[within - rows.start]
            error = manifest.profile_error.get(tap, {}).get("channel_relative_error", 0.0)
            check_states(probe, widen(stored), tap=tap, profile_error=error, name=name)


def split_name(name: str) -> tuple[Path, int | None]:
    """Return folder and part number of `FOLDER` or `FOLDER#NUMBER`."""
    match = re.fullmatch(r"(.+)#(\d+)", name)
    if match is None or Path(name).exists():
        return Path(name), None
    return Path(match[1]), int(match[2])


def _read_receipt(root: Path, manifest: Manifest, unit: int, stamp: tuple[int, ...]) -> Receipt:
    """Read a receipt whose file has this time of change, number and size."""
    return read_receipt(root, manifest, unit)


def _check_documents(root: Path, manifest: Manifest) -> None:
    """Check the documents of groups and arrays against the manifest."""
    for path, digests in manifest.files.items():
        if path.endswith("/zarr.json"):
            try:
                content = read_below(root, path, max_bytes=MAX_DOCUMENT_BYTES)
                found = sha256_hex(content)
            except FileNotFoundError:
                found = "no file"
            if found not in digests:
                raise DamagedStoreError(
                    f"{root / path}: not as it was written: expected SHA-256 {digests[0]}, "
                    f"got {found}"
                )
            name = path.removesuffix("/zarr.json")
            if name in ROW_ARRAYS or name.startswith(_OVER_UNITS):
                try:
                    check_unit_document(content, manifest, name)
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    raise DamagedStoreError(
                        f"{root / path}: does not agree with the manifest: {error}"
                    ) from error
