"""Writing one unit: its input out of the store, its hidden states into it, its receipt last.

A unit is idempotent: whoever computes it, whenever, whatever a killed try left behind, the files
are written whole under their names and the receipt after all of them. Letters: R rows of a unit,
D base width, n samples of a unit.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import widen
from carryon.cache.errors import InputError
from carryon.cache.files import write_file
from carryon.cache.format.arrays import array_info, read_array, read_chunk
from carryon.cache.format.codec import chunk_checksums, encode_chunk, encode_shard
from carryon.cache.format.manifest import Manifest, sha256_hex
from carryon.cache.format.quantization import STEPS, bfloat16_bits, to_codes
from carryon.cache.format.receipt import FileEntry, Receipt, origin_of, write_receipt
from carryon.cache.format.zarr_metadata import (
    ROW_ARRAYS,
    channel_scale_path,
    row_path,
    shard_path,
    token_scale_path,
)
from carryon.cache.versions import library_versions

States = NDArray[Any]  # float32, or uint16 bits of bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitInput:
    """What is needed to compute a unit."""

    unit: int
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


def read_unit_input(
    root: Path,
    manifest: Manifest,
    unit: int,
    *,
    starts: NDArray[np.int64],
    lengths: NDArray[np.int32],
) -> UnitInput:
    """Read a unit's tokens; masks and character ends are read too, and held to their checksums.

    Args:
        root: of the store.
        manifest: of the store.
        unit: which one.
        starts: [n] first row of each of its samples, on the token axis.
        lengths: [n] their tokens.

    Raises:
        DamagedStoreError: a file is missing or does not match its checksum.
    """
    rows = {
        name: read_chunk(root, row_path(name, unit), array_info(root, name), sha256=None)
        for name in ROW_ARRAYS
    }
    within = starts - unit * manifest.unit_tokens
    digest = hashlib.sha256(origin_of(manifest, unit).encode())
    for values in (within, lengths, *rows.values()):
        digest.update(np.ascontiguousarray(values).tobytes())
    return UnitInput(
        unit=unit, starts=within, lengths=lengths, tokens=rows["tokens"], sha256=digest.hexdigest()
    )


def read_sample_places(
    root: Path, manifest: Manifest
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return first row and length of every planned sample, [S] each."""
    stop, digests = manifest.num_samples, manifest.files
    starts = read_array(root, "samples/start", stop=stop, digests=digests)
    return starts, read_array(root, "samples/length", stop=stop, digests=digests)


def write_unit(
    root: Path,
    manifest: Manifest,
    unit_input: UnitInput,
    hidden: Mapping[str, States],
    *,
    elapsed_s: float,
) -> Receipt:
    """Write a unit's hidden states, then its receipt.

    Args:
        root: of the store.
        manifest: of the store.
        unit_input: what the states were computed from.
        hidden: [R, D] float32 for each tap of the store; rows without a sample are 0. For an
            `exact` bfloat16 store also uint16 bits.
        elapsed_s: seconds its computation took.

    Raises:
        InputError: taps or shapes do not fit, or a state is not finite in the type it is stored
            in; names sample, token and tap. Nothing of the unit was written.
        DiskFullError: no space left; the unit has no receipt and will be computed again.
    """
    _check_shapes(manifest, unit_input, hidden)
    unit = unit_input.unit
    stored = {tap: _stored(manifest, states) for tap, states in hidden.items()}
    for tap, rows in stored.items():
        _check_rows(root, manifest, unit_input, tap, hidden[tap])
        if rows is not hidden[tap]:
            _check_rows(root, manifest, unit_input, tap, rows)
    entries: dict[str, FileEntry] = {}
    for name in ROW_ARRAYS:
        path = row_path(name, unit)
        entries[path] = _entry((root / path).read_bytes())
    for tap, rows in stored.items():
        for path, content in _encode_tap(manifest, tap, unit, rows):
            write_file(root / path, content)
            chunks = _checksums(manifest, content) if path == shard_path(tap, unit) else []
            entries[path] = _entry(content, chunks=chunks)
    receipt = Receipt(
        unit=unit,
        num_tokens=unit_input.num_tokens,
        origin_sha256=origin_of(manifest, unit),
        input_sha256=unit_input.sha256,
        files=entries,
        elapsed_s=round(elapsed_s, 3),
        versions=library_versions(),
    )
    write_receipt(root, receipt)
    return receipt


def _encode_tap(
    manifest: Manifest, tap: str, unit: int, rows: NDArray[Any]
) -> list[tuple[str, bytes | bytearray]]:
    profile = manifest.settings["profile"]
    rows_per_chunk = manifest.rows_per_chunk
    if profile not in STEPS:
        return [(shard_path(tap, unit), encode_shard(rows, rows_per_chunk=rows_per_chunk))]
    codes = to_codes(rows, step=STEPS[profile])
    return [
        (shard_path(tap, unit), encode_shard(codes.codes, rows_per_chunk=rows_per_chunk)),
        (token_scale_path(tap, unit), encode_chunk(codes.token_scale)),
        (channel_scale_path(tap, unit), encode_chunk(codes.channel_scale[None])),
    ]


def _stored(manifest: Manifest, states: States) -> NDArray[Any]:
    """Return the states in the type that is stored, or float32 for a lossy profile."""
    if manifest.is_lossy:
        return widen(states)
    if states.dtype == np.uint16:
        return states
    dtype = manifest.settings["dtype"]
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        return bfloat16_bits(states) if dtype == "bfloat16" else states.astype(dtype)


def _check_shapes(manifest: Manifest, unit_input: UnitInput, hidden: Mapping[str, States]) -> None:
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
    root: Path, manifest: Manifest, unit_input: UnitInput, tap: str, rows: NDArray[Any]
) -> None:
    """Check rows [R, D] as given or as stored: all finite, and 0 where there is no sample."""
    unit = unit_input.unit
    if rows[unit_input.num_tokens :].any():
        raise InputError(
            f"unit {unit}, tap {tap}: expected 0 in the rows after the last sample's "
            f"{unit_input.num_tokens} tokens, got states: nothing of this unit was written"
        )
    finite = _is_finite(rows)
    if not finite.all():
        row = int(np.argmin(finite))
        within = int(np.searchsorted(unit_input.starts, row, side="right")) - 1
        name = _sample_id(root, manifest, unit, within)
        raise InputError(
            f"unit {unit}, tap {tap}: a state is not finite as {manifest.settings['dtype']}, in "
            f"sample {name!r} at token {row - int(unit_input.starts[within])}: nothing of this "
            "unit was written; leave the sample out or compute and store in another dtype"
        )


def _sample_id(root: Path, manifest: Manifest, unit: int, within: int) -> str:
    """Return the id of the sample that is number `within` of a unit."""
    starts, _ = read_sample_places(root, manifest)
    sample = int(np.searchsorted(starts, unit * manifest.unit_tokens)) + within
    ids = read_array(root, "samples/id", first=sample, stop=sample + 1, digests=manifest.files)
    return bytes(ids.tobytes()).rstrip(b"\0").decode()


def _is_finite(states: States) -> NDArray[np.bool_]:
    """Return, for each row, whether all its values are finite; uint16 holds bfloat16 bits."""
    if states.dtype == np.uint16:
        return np.asarray(((states & 0x7F80) != 0x7F80).all(axis=1))
    return np.asarray(np.isfinite(states).all(axis=1))


def _checksums(manifest: Manifest, shard: bytes | bytearray) -> list[str]:
    num_chunks = manifest.unit_tokens // manifest.rows_per_chunk
    return chunk_checksums(memoryview(shard), num_chunks=num_chunks, name="new shard")


def _entry(content: bytes | bytearray, *, chunks: Sequence[str] = ()) -> FileEntry:
    return FileEntry(bytes=len(content), sha256=sha256_hex(content), chunks=list(chunks))
