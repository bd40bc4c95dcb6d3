"""Quantization: bfloat16 as raw bits, and the grids of the lossy profiles.

A lossy profile stores each state on a uniform grid:

    u = x / channel          channel = sqrt of the channel's RMS over the unit's ordinary tokens
    q = round(u / token)     token = step * RMS of the token's u
    x' = q * token * channel

q is stored as uint16 with an offset that leaves the high byte constant for all but outliers, so
that Blosc's byte shuffle and Huffman stage reach the entropy of q; no codec beyond Zarr's own is
needed. Letters: R rows, D width.
"""

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STATE_TYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("uint16"),
    "float16": np.dtype("float16"),
    "float32": np.dtype("float32"),
}
"""Array type of each dtype of states: numpy and zarr have no bfloat16, so uint16 holds its bits."""

STEPS = {"near": 0.04, "compact": 0.08}
"""Grid step of each lossy profile, relative to the token's RMS. Chosen by measurement: see
`python -m carryon.tools.bench store`."""

CODE_OFFSET = 0x8080
"""Code of q = 0: q in [-128, 127] keeps the high byte at 0x80."""
_LARGEST_Q = 0x7F7F
_BLOCK_VALUES = 1 << 16
"""Values decoded at a time: 256 kB of float32 stay in a core's cache through all passes. Over
whole units the passes wait for memory: 0.35 GB/s of bfloat16 instead of 1."""
_HIGH_HALF = 1 if sys.byteorder == "little" else 0
_OUTLIER = 10.0
"""Tokens whose norm is above this multiple of the unit's median (attention sinks) are left out of
the channel statistics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Codes:
    """A unit's states at one tap, on the grid of a lossy profile."""

    codes: NDArray[np.uint16]
    """[R, D] uint16: q + CODE_OFFSET."""
    token_scale: NDArray[np.float32]
    """[R] float32: grid step of each token, in units of the channel scale."""
    channel_scale: NDArray[np.float32]
    """[D] float32: square root of each channel's RMS."""


def bfloat16_bits(states: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return `states` rounded to bfloat16 (nearest, ties to even), as raw bits. Finite input."""
    bits = np.ascontiguousarray(states, dtype=np.float32).view(np.uint32)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (rounded >> 16).astype(np.uint16)


def to_codes(states: NDArray[np.float32], *, step: float) -> Codes:
    """Put the states [R, D] float32 of a unit on the grid; rows of zeros stay zeros."""
    channel = _channel_scale(states)
    scaled = states / channel
    token = (step * np.sqrt(np.mean(scaled * scaled, axis=1))).astype(np.float32)
    # A row whose largest value would leave the code's range gets a coarser grid.
    token = np.maximum(token, np.abs(scaled).max(axis=1) / _LARGEST_Q)
    safe = np.where(token > 0, token, np.float32(1.0))
    q = np.rint(scaled / safe[:, None]).astype(np.int32)
    return Codes(
        codes=(q + CODE_OFFSET).astype(np.uint16), token_scale=token, channel_scale=channel
    )


def from_codes(codes: Codes, *, out: NDArray[np.uint16] | None = None) -> NDArray[np.uint16]:
    """Return the states [R, D] as bfloat16 bits, in `out` if it is given."""
    num_rows, width = codes.codes.shape
    made = np.empty((num_rows, width), dtype=np.uint16) if out is None else out
    per_block = max(1, _BLOCK_VALUES // width)
    scaled = np.empty((min(per_block, num_rows), width), dtype=np.float32)
    for first in range(0, num_rows, per_block):
        rows = slice(first, min(first + per_block, num_rows))
        block = scaled[: rows.stop - first]
        np.subtract(codes.codes[rows], np.float32(CODE_OFFSET), out=block)
        block *= codes.token_scale[rows, None]
        block *= codes.channel_scale
        # To the nearest bfloat16, as its bits are the high half of the float32's. Halfway between
        # two, away from zero: to even would cost three more passes.
        bits = block.view(np.uint32)
        bits += 0x8000
        made[rows] = bits.view(np.uint16)[:, _HIGH_HALF::2]
    return made


def _channel_scale(states: NDArray[np.float32]) -> NDArray[np.float32]:
    largest = np.float32(np.abs(states).max(initial=0))
    if largest == 0:
        return np.ones(states.shape[1], dtype=np.float32)
    states = states / largest  # squares of very large or small states would leave float32
    norms = np.sqrt(np.mean(states * states, axis=1))
    used = norms[norms > 0]
    limit = _OUTLIER * float(np.median(used)) if len(used) else 0.0
    ordinary = states[(norms > 0) & (norms <= limit)]
    rms = np.sqrt(np.mean(ordinary * ordinary, axis=0))
    floor = float(rms.max()) * 1e-6  # a channel that is always zero
    return np.asarray(np.sqrt(np.maximum(rms, floor)) * np.sqrt(largest), dtype=np.float32)
