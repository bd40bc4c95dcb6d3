"""Write one unit: read its input from the store, write its hidden states, and its receipt last.

Writing a unit can be repeated: after a kill, by another process, at any time. Its files are
written atomically, and the receipt after all of them. Letters: R rows of a unit, D base width,
n samples of a unit.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import widen
from carryon.cache.errors import DamagedStoreError, InputError
from carryon.cache.files.atomic import Content, Part, write_file
from carryon.cache.files.regular import read_below
from carryon.cache.format.arrays import check_tokens, read_array, read_chunk, unit_array_info
from carryon.cache.format.codec import (
    chunk_mapper,
    chunk_parts,
    encode_chunk,
    shard_index_bytes,
)
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.quantization import STEPS, bfloat16_bits, to_codes
from carryon.cache.format.receipt import FileEntry, Receipt, origin_of, write_receipt
from carryon.cache.format.zarr_metadata import (
    ROW_ARRAYS,
    channel_scale_path,
    row_path,
    shard_path,
    token_scale_path,
)
from carryon.cache.store.samples import check_places
from carryon.cache.store.shard_reader import are_finite, is_finite
from carryon.cache.versions import library_versions

States = NDArray[Any]  # float32, or uint16 bits of bfloat16


class Rows(Protocol):
    """States [R, D] that are read a few rows at a time, such as an array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """R and D."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32, or uint16 for bits of bfloat16."""

    def __getitem__(self, rows: slice, /) -> States:
        """Return some rows, contiguous."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedFile:
    """A file of a unit, in memory."""

    parts: list[Part]
    """One after another."""
    chunks: list[str]
    """As of FileEntry."""

    @classmethod
    def of_chunks(cls, chunks: Iterable[tuple[bytes | memoryview, bytes]]) -> "EncodedFile":
        """Return a shard of some chunks, each content and checksum."""
        chunks = list(chunks)
        parts: list[Part] = [*chain.from_iterable(chunks), shard_index_bytes(chunks)]
        return cls(parts=parts, chunks=[checksum.hex() for _, checksum in chunks])

    def entry(self) -> FileEntry:
        """Return size and digest of the file."""
        digest = hashlib.sha256()
        for part in self.parts:
            digest.update(part)
        num_bytes = sum(map(len, self.parts))
        return FileEntry(bytes=num_bytes, sha256=digest.hexdigest(), chunks=self.chunks)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedUnit:
    """The files of a unit's hidden states, in memory."""

    files: dict[str, EncodedFile]
    """By path relative to the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitInput:
    """What a unit is computed from."""

    unit: int
    first_sample: int
    """Index of its first sample in the store."""
    starts: NDArray[np.int64]
    """[n] first row of each sample within the unit."""
    lengths: NDArray[np.int32]
    """[n] tokens of each sample."""
    tokens: NDArray[np.int32]
    """[R] token ids; rows after the last sample are 0."""
    sha256: str
    """Digest of this input and of the settings the unit is computed with."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the unit's samples."""
        return int(self.lengths.sum())


class UnitInputs:
    """Reader of the inputs of a planned store's units."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        """Read where each sample lies."""
        self._root, self._manifest = root, manifest
        stop, digests = manifest.num_samples, manifest.files
        self._starts = read_array(root, "samples/start", stop=stop, digests=digests)
        self.lengths: NDArray[np.int32] = read_array(
            root, "samples/length", stop=stop, digests=digests
        )
        """[S] tokens of each sample of the store."""
        check_places(self._starts, self.lengths, manifest, name=str(root))
        first_rows = np.arange(manifest.num_units + 1) * manifest.unit_tokens
        bounds = np.searchsorted(self._starts, first_rows)
        _check_planned(self._starts, self.lengths, bounds, first_rows, name=str(root))
        self._bounds = bounds.tolist()

    def num_tokens(self, unit: int) -> int:
        """Return the tokens of a unit's samples."""
        return int(self.lengths[self.samples(unit)].sum())

    def samples(self, unit: int) -> slice:
        """Return which samples of the store are in a unit."""
        return slice(self._bounds[unit], self._bounds[unit + 1])

    def read(self, unit: int) -> UnitInput:
        """Read the input of a unit; all its files are compared with their checksums.

        Raises:
            DamagedStoreError: a file is missing or does not match its checksum, or a token id is
                not one of the base.
        """
        rows = {
            name: read_chunk(
                self._root,
                row_path(name, unit),
                unit_array_info(self._manifest, name),
                sha256=None,
            )
            for name in ROW_ARRAYS
        }
        check_tokens(
            rows["tokens"], self._manifest, name=str(self._root / row_path("tokens", unit))
        )
        first, stop = self._bounds[unit : unit + 2]
        starts = self._starts[first:stop] - unit * self._manifest.unit_tokens
        lengths = self.lengths[first:stop]
        digest = hashlib.sha256(origin_of(self._manifest, unit).encode())
        for values in (starts, lengths, *rows.values()):
            digest.update(np.ascontiguousarray(values).tobytes())
        return UnitInput(
            unit=unit,
            first_sample=first,
            starts=starts,
            lengths=lengths,
            tokens=rows["tokens"],
            sha256=digest.hexdigest(),
        )


def _check_planned(
    starts: NDArray[np.int64],
    lengths: NDArray[np.int32],
    bounds: NDArray[np.int64],
    first_rows: NDArray[np.int64],
    *,
    name: str,
) -> None:
    """Check that each unit has samples, one behind the other from its first row on, none empty.

    A stranger's store may have others. A unit without samples is never computed, and processes that
    share it would wait for it without end.

    Args:
        starts: [S] first row of each sample.
        lengths: [S] tokens of each sample.
        bounds: [U + 1] first sample of each unit, and S.
        first_rows: [U + 1] first row of each unit, and the rows of the store.
        name: of the store, for errors.
    """
    is_filled = bool((np.diff(bounds) > 0).all()) and bool((lengths > 0).all())
    if is_filled:
        expected = np.concatenate([first_rows[:1], (starts + lengths)[:-1]])
        expected[bounds[:-1]] = first_rows[:-1]
        is_filled = np.array_equal(starts, expected)
    if not is_filled:
        raise DamagedStoreError(
            f"{name}: samples/start, samples/length: expected the samples of a unit one behind "
            "the other from its first row on, each of a token or more, got others",
            fix="extract into another folder",
        )


def write_unit(
    root: Path,
    manifest: Manifest,
    unit_input: UnitInput,
    hidden: Mapping[str, Rows] | EncodedUnit,
    *,
    elapsed_s: float,
) -> Receipt:
    """Write a unit's hidden states, then its receipt; arguments and errors of `write_states`."""

    def write(path: str, content: Content) -> None:
        write_file(root / path, content, root=root)

    receipt = write_states(root, manifest, unit_input, hidden, elapsed_s=elapsed_s, write=write)
    write_receipt(root, receipt)
    return receipt


def write_states(
    root: Path,
    manifest: Manifest,
    unit_input: UnitInput,
    hidden: Mapping[str, Rows] | EncodedUnit,
    *,
    elapsed_s: float,
    write: Callable[[str, Content], None],
) -> Receipt:
    """Write a unit's hidden states and return its receipt, which is not written.

    Args:
        root: of the store.
        manifest: of the store.
        unit_input: what the states were computed from.
        hidden: states as of `encode_unit`, or what it made of them.
        elapsed_s: seconds its computation took.
        write: called with the path of each file, relative to the store, and its content.

    Raises:
        InputError: as of `encode_unit`. Nothing of the unit was written.
        DiskFullError: no space left; the unit has no receipt and will be computed again.
    """
    if not isinstance(hidden, EncodedUnit):
        hidden = encode_unit(root, manifest, unit_input, hidden)
    unit = unit_input.unit
    entries: dict[str, FileEntry] = {}
    for path in (row_path(name, unit) for name in ROW_ARRAYS):
        entries[path] = EncodedFile(parts=[read_below(root, path)], chunks=[]).entry()
    for path, file in hidden.files.items():
        write(path, file.parts)
        entries[path] = file.entry()
    return Receipt(
        unit=unit,
        num_tokens=unit_input.num_tokens,
        origin_sha256=origin_of(manifest, unit),
        input_sha256=unit_input.sha256,
        files=entries,
        elapsed_s=round(elapsed_s, 3),
        versions=library_versions(),
    )


def encode_unit(
    root: Path,
    manifest: Manifest,
    unit_input: UnitInput,
    hidden: Mapping[str, Rows],
    *,
    pool: ThreadPoolExecutor | None = None,
) -> EncodedUnit:
    """Encode a unit's hidden states, chunk by chunk; nothing is written.

    Args:
        root: of the store, for errors.
        manifest: of the store.
        unit_input: what the states were computed from.
        hidden: [R, D] float32 for each tap of the store; rows without a sample are 0. For an
            `exact` or `raw` bfloat16 store also uint16 bits.
        pool: threads that encode chunks. None: some of its own.

    Raises:
        InputError: taps or shapes do not match the store, or a state is not finite in the stored
            type; names sample, token and tap.
    """
    _check_shapes(manifest, unit_input, hidden)
    per_chunk, unit = manifest.rows_per_chunk, unit_input.unit
    encode = partial(chunk_parts, is_raw=manifest.is_raw)
    firsts = range(0, manifest.unit_tokens, per_chunk)

    def encode_rows(tap: str, first: int) -> tuple[bytes | memoryview, bytes]:
        return encode(_checked(root, manifest, unit_input, tap, hidden[tap], first))

    with chunk_mapper(len(firsts), pool) as each:
        if not manifest.is_lossy:
            # Chunks of all taps wait for a thread, before the first one is waited for.
            chunks = {tap: each(partial(encode_rows, tap), firsts) for tap in manifest.taps}
            shards = {shard_path(tap, unit): own for tap, own in chunks.items()}
            files = {path: EncodedFile.of_chunks(own) for path, own in shards.items()}
            return EncodedUnit(files=files)
        files = {}
        stored = {
            tap: _checked(root, manifest, unit_input, tap, rows, 0, manifest.unit_tokens)
            for tap, rows in hidden.items()
        }
        for tap, values in stored.items():
            codes = to_codes(values, step=STEPS[manifest.settings["profile"]])
            scales = {
                token_scale_path(tap, unit): codes.token_scale,
                channel_scale_path(tap, unit): codes.channel_scale[None],
            }
            for path, scale in scales.items():
                files[path] = EncodedFile(parts=[encode_chunk(scale)], chunks=[])
            parts = [codes.codes[first : first + per_chunk] for first in firsts]
            files[shard_path(tap, unit)] = EncodedFile.of_chunks(each(encode, parts))
    return EncodedUnit(files=files)


def _checked(
    root: Path,
    manifest: Manifest,
    unit_input: UnitInput,
    tap: str,
    hidden: Rows,
    first: int,
    count: int = 0,
) -> NDArray[Any]:
    """Return `count` rows from `first` on in the stored type, checked; 0: those of a chunk."""
    given = hidden[first : first + (count or manifest.rows_per_chunk)]
    stored = _stored(manifest, given)
    _check_rows(root, manifest, unit_input, tap, given, first)
    if stored is not given:
        _check_rows(root, manifest, unit_input, tap, stored, first)
    return stored


def _stored(manifest: Manifest, states: States) -> NDArray[Any]:
    """Return the states in the stored type, or float32 for a lossy profile."""
    if manifest.is_lossy:
        return widen(states)
    if states.dtype == np.uint16:
        return states
    if manifest.settings["dtype"] == "bfloat16":
        return bfloat16_bits(states)
    with np.errstate(over="ignore"):  # a value that is too large becomes infinite: refused below
        return states.astype(manifest.states_dtype)


def _check_shapes(manifest: Manifest, unit_input: UnitInput, hidden: Mapping[str, Rows]) -> None:
    unit = unit_input.unit
    if list(hidden) != manifest.taps:
        raise InputError(f"unit {unit}: expected states at {manifest.taps}, got {list(hidden)}")
    expected = (manifest.unit_tokens, manifest.width)
    for tap, states in hidden.items():
        if states.shape != expected:
            raise InputError(
                f"unit {unit}, tap {tap}: expected {expected} states, one row for each row of the "
                f"unit, got {states.shape}"
            )


def _check_rows(
    root: Path,
    manifest: Manifest,
    unit_input: UnitInput,
    tap: str,
    rows: NDArray[Any],
    first: int,
) -> None:
    """Check rows [r, D], from `first` on, as given or as stored: finite, 0 without a sample."""
    unit = unit_input.unit
    if rows[max(0, unit_input.num_tokens - first) :].any():
        raise InputError(
            f"unit {unit}, tap {tap}: expected 0 in the rows after the last sample's "
            f"{unit_input.num_tokens} tokens, got states: nothing of this unit was written"
        )
    if are_finite(rows):
        return
    row = first + int(np.argmin(is_finite(rows).all(axis=1)))
    within = int(np.searchsorted(unit_input.starts, row, side="right")) - 1
    sample = unit_input.first_sample + within
    ids = read_array(root, "samples/id", first=sample, stop=sample + 1, digests=manifest.files)
    name = bytes(ids.tobytes()).rstrip(b"\0").decode()
    raise InputError(
        f"unit {unit}, tap {tap}: a state is not finite as {manifest.settings['dtype']}, in "
        f"sample {name!r} at token {row - int(unit_input.starts[within])}: nothing of this "
        "unit was written; leave the sample out or compute and store in another dtype"
    )
