"""Writing one unit: its input out of the store, its hidden states into it, its receipt last.

A unit is idempotent: whoever computes it, whenever, whatever a killed try left behind, the files
are written whole under their names and the receipt after all of them. Letters: R rows of a unit,
D base width, n samples of a unit.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.arrays import array_info, read_array, read_chunk
from carryon.cache.atomic import write_file
from carryon.cache.chunk import encode_chunk, encode_shard
from carryon.cache.errors import InputError
from carryon.cache.head import widen
from carryon.cache.layout import (
    ROW_ARRAYS,
    channel_scale_path,
    row_path,
    shard_path,
    token_scale_path,
)
from carryon.cache.manifest import Manifest, digest_of, sha256_hex
from carryon.cache.precision import STEPS, bfloat16_bits, to_codes
from carryon.cache.receipt import FileEntry, Receipt, write_receipt

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
    """Read a unit's tokens.

    Args:
        root: of the store.
        manifest: of the store.
        unit: which one.
        starts: [n] first row of each of its samples, on the token axis.
        lengths: [n] their tokens.
    """
    tokens = read_chunk(root, row_path("tokens", unit), array_info(root, "tokens"))
    mask = read_chunk(root, row_path("loss_mask", unit), array_info(root, "loss_mask"))
    within = starts - unit * manifest.unit_tokens
    digest = hashlib.sha256(_computed_with(manifest).encode())
    for values in (within, lengths, tokens, mask):
        digest.update(np.ascontiguousarray(values).tobytes())
    return UnitInput(
        unit=unit, starts=within, lengths=lengths, tokens=tokens, sha256=digest.hexdigest()
    )


def read_sample_places(
    root: Path, manifest: Manifest
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return first row and length of every planned sample, [S] each."""
    stop = manifest.num_samples
    starts = read_array(root, "samples/start", stop=stop)
    return starts, read_array(root, "samples/length", stop=stop)


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
        InputError: taps or shapes do not fit, or a state is not finite; names sample row and tap.
        DiskFullError: no space left; the unit has no receipt and will be computed again.
    """
    _check(manifest, unit_input, hidden)
    unit = unit_input.unit
    entries: dict[str, FileEntry] = {}
    for name in ROW_ARRAYS:
        path = row_path(name, unit)
        entries[path] = _entry((root / path).read_bytes())
    for tap, states in hidden.items():
        for path, content in _encode_tap(manifest, tap, unit, states):
            write_file(root / path, content)
            entries[path] = _entry(content)
    receipt = Receipt(
        unit=unit,
        num_tokens=unit_input.num_tokens,
        input_sha256=unit_input.sha256,
        files=entries,
        elapsed_s=round(elapsed_s, 3),
    )
    write_receipt(root, receipt)
    return receipt


def _encode_tap(
    manifest: Manifest, tap: str, unit: int, states: States
) -> list[tuple[str, bytes | bytearray]]:
    profile = manifest.settings["profile"]
    rows_per_chunk = manifest.rows_per_chunk
    if profile not in STEPS:
        rows = _stored(states, dtype=manifest.settings["dtype"])
        return [(shard_path(tap, unit), encode_shard(rows, rows_per_chunk=rows_per_chunk))]
    codes = to_codes(widen(states), step=STEPS[profile])
    return [
        (shard_path(tap, unit), encode_shard(codes.codes, rows_per_chunk=rows_per_chunk)),
        (token_scale_path(tap, unit), encode_chunk(codes.token_scale)),
        (channel_scale_path(tap, unit), encode_chunk(codes.channel_scale[None])),
    ]


def _stored(states: States, *, dtype: str) -> NDArray[Any]:
    if states.dtype == np.uint16:
        return states
    return bfloat16_bits(states) if dtype == "bfloat16" else states.astype(dtype)


def _check(manifest: Manifest, unit_input: UnitInput, hidden: Mapping[str, States]) -> None:
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
        finite = _is_finite(states)
        if not finite.all():
            row = int(np.argmin(finite))
            sample = int(np.searchsorted(unit_input.starts, row, side="right")) - 1
            raise InputError(
                f"unit {unit}, tap {tap}: the base gave a state that is not finite, in sample "
                f"{sample} of the unit at token {row - int(unit_input.starts[sample])}: nothing "
                "of this unit was written; leave the sample out or compute in another dtype"
            )


def _is_finite(states: States) -> NDArray[np.bool_]:
    """Return, for each row, whether all its values are finite; uint16 holds bfloat16 bits."""
    if states.dtype == np.uint16:
        return np.asarray(((states & 0x7F80) != 0x7F80).all(axis=1))
    return np.asarray(np.isfinite(states).all(axis=1))


def _computed_with(manifest: Manifest) -> str:
    return digest_of(
        {
            "base": manifest.base,
            "forward": manifest.forward,
            "settings": manifest.settings,
            "width": manifest.width,
        }
    )


def _entry(content: bytes | bytearray) -> FileEntry:
    return FileEntry(bytes=len(content), sha256=sha256_hex(content))
