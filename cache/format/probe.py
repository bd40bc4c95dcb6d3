"""The probe: a check that hidden states, norm and head of a store belong together.

When a store is planned, the base runs over the beginnings of a few samples. Stored are a few
positions: their states at every tap, and the base's own top logits. Opening the store checks with
numpy that head and norm turn these states into these logits, and that the stored rows are these
states. A wrong norm, layer or head would otherwise train without an error.
Letters: P probe positions, D width, K logits kept of each.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.base.lm_head import Head
from carryon.cache.errors import DamagedStoreError
from carryon.cache.format.arrays import array_info, encode_array, read_array
from carryon.cache.format.manifest import Manifest

NUM_LOGITS = 8
_MAX_ROWS = 4096
_HEAD_TOLERANCE = 0.03  # a base that computes in bfloat16 rounds its logits to 1 part in 256
_STATE_TOLERANCE = 0.05  # the same states in batches of another shape, each channel by its RMS


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A few positions seen by the base itself."""

    rows: NDArray[np.int64]
    """[P] row of each position on the token axis."""
    states: Mapping[str, NDArray[np.float32]]
    """[P, D] float32 for each tap of the store, and always `final`."""
    top_ids: NDArray[np.int32]
    """[P, K] tokens of the base's largest logits."""
    top_logits: NDArray[np.float32]
    """[P, K] those logits."""


def encode_probe(probe: Probe) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of each file of the probe."""
    arrays: dict[str, NDArray[Any]] = {
        "rows": probe.rows,
        "top_ids": probe.top_ids,
        "top_logits": probe.top_logits,
    }
    arrays |= {f"states/{tap}": states for tap, states in probe.states.items()}
    for name, values in arrays.items():
        yield from encode_array(f"probe/{name}", values, rows_per_chunk=len(values))


def read_probe(root: Path, manifest: Manifest) -> Probe:
    """Read the probe of a store."""

    def read(name: str) -> NDArray[Any]:
        return read_array(root, f"probe/{name}", digests=manifest.files, info=infos[name])

    taps = {*manifest.taps, "final"}
    infos = {
        name: array_info(root, f"probe/{name}", digests=manifest.files)
        for name in ("rows", "top_ids", "top_logits", *(f"states/{tap}" for tap in taps))
    }
    shapes = {name: info.shape for name, info in infos.items()}
    num_rows, num_logits = shapes["rows"][0], shapes["top_ids"][-1]
    expected: dict[str, tuple[int, ...]]
    expected = {name: (num_rows, manifest.width) for name in shapes}
    expected |= {
        "rows": (num_rows,),
        **dict.fromkeys(("top_ids", "top_logits"), (num_rows, num_logits)),
    }
    if shapes != expected or not 1 <= num_rows <= _MAX_ROWS or not 1 <= num_logits <= _MAX_ROWS:
        raise DamagedStoreError(f"{root}: probe: expected shapes {expected}, got {shapes}")
    probe = Probe(
        rows=read("rows"),
        states={tap: read(f"states/{tap}") for tap in taps},
        top_ids=read("top_ids"),
        top_logits=read("top_logits"),
    )
    units = probe.rows // manifest.unit_tokens
    if not 0 <= units[0] < manifest.num_units or (units != units[0]).any():
        raise DamagedStoreError(
            f"{root}: probe: expected rows of one unit, got {probe.rows.tolist()!s:.80}"
        )
    return probe


def check_head(probe: Probe, head: Head, *, name: str) -> None:
    """Check that head and norm turn the probe's states into the base's logits.

    Args:
        probe: of the store.
        head: with only the rows of `probe.top_ids`, in that order, [P * K, D].
        name: of the store, for errors.

    Raises:
        DamagedStoreError: they do not; names the error.
    """
    rows = np.arange(probe.top_ids.size, dtype=np.int32).reshape(probe.top_ids.shape)
    made = head.logits(probe.states["final"], rows)
    error = _rms(made - probe.top_logits) / max(_rms(probe.top_logits), 1e-6)
    if not error <= _HEAD_TOLERANCE:  # also when it is not a number
        raise DamagedStoreError(
            f"{name}: the head does not turn the probe's states into the base's logits: expected "
            f"a relative error up to {_HEAD_TOLERANCE}, got {error:.3f}: head or logit scale is "
            "another base's",
            fix="extract into another folder",
        )
    if "prenorm" in probe.states:
        normed = head.norm.apply(probe.states["prenorm"])
        _compare(normed, probe.states["final"], tolerance=_HEAD_TOLERANCE, what=f"{name}: the norm")


def check_states(
    probe: Probe, stored: NDArray[np.float32], *, tap: str, profile_error: float, name: str
) -> None:
    """Check that the stored rows [P, D] of a tap are the states that the base gave there.

    Args:
        probe: of the store.
        stored: the rows `probe.rows` of the tap, [P, D] float32.
        tap: which tap.
        profile_error: the channel-relative error that a lossy profile recorded, else 0.
        name: of the store, for errors.

    Raises:
        DamagedStoreError: they are not, but another layer's or those before a norm.
    """
    tolerance = _STATE_TOLERANCE + 2 * profile_error
    _compare(stored, probe.states[tap], tolerance=tolerance, what=f"{name}: tap {tap}")


def channel_rms(states: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the RMS of each channel of states [P, D], [D]; at least 1e-4 of the largest."""
    channel = np.sqrt(np.mean(np.square(states, dtype=np.float64), axis=0))
    return np.asarray(np.maximum(channel, channel.max() * 1e-4))


def channel_relative_error(
    made: NDArray[np.float32],
    expected: NDArray[np.float32],
    *,
    channel: NDArray[np.float64] | None = None,
) -> float:
    """Return the RMS of (made - expected), each channel in units of its own RMS; [P, D] both.

    Some channels of a residual stream are a hundred times larger than the rest: unweighted, they
    would hide errors in all others.

    Args:
        made: states to judge.
        expected: what they should be.
        channel: RMS of each channel, [D], of more rows than these few. None: that of `expected`.
    """
    channel = channel_rms(expected) if channel is None else channel
    return _rms((made.astype(np.float64) - expected) / channel)


def _compare(
    made: NDArray[np.float32], expected: NDArray[np.float32], *, tolerance: float, what: str
) -> None:
    error = channel_relative_error(made, expected)
    if not error <= tolerance:
        raise DamagedStoreError(
            f"{what} does not hold the base's states at the probe's positions: expected a relative "
            f"error up to {tolerance:.3f}, got {error:.3f}: the states were taken elsewhere "
            "(another layer, or the other side of a norm)",
            fix="extract into another folder",
        )


def _rms(values: NDArray[np.floating[Any]]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
