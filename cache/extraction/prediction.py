"""Predict the bytes and seconds of an extraction from its own first batches.

Nothing is run twice: the batches of the first units are taken in an order that spreads over
lengths, and what they took says what the rest will take. A batch of n rows of L tokens needs
a n L + b n L^2 + c seconds: products, attention, and what every batch costs.
Letters: R rows of a unit, D base width.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from carryon.cache.extraction.packing import plan_batches
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.zarr_metadata import receipt_path, state_paths
from carryon.cache.progress import show_seconds
from carryon.cache.store.sizes import (
    UnitSizes,
    bytes_by_folder,
    file_bytes,
    raw_bytes,
    receipt_bytes,
)

PILOT_BATCHES = 5
"""Batches that are timed: one to warm up, then small, long, short and middling ones."""
_PILOT_SHARE = 4  # at most one batch of four is waited for
_PILOT_BYTES = 32 << 20  # states of all taps that are encoded: about 0.2 s
_WARM_RATIO = 1.2
_PLANNED_UNITS = 256  # whose batches are planned; a larger store is like these
T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Bytes and seconds of an extraction, predicted or as written."""

    raw_bytes: int
    """Hidden states of the units computed by one call, before compression, without unused rows."""
    stored_bytes: int
    """The same in the store, with the scales of a lossy profile."""
    head_bytes: int
    """LM head and final norm in the store."""
    blocks_bytes: int
    """The base's last blocks in the store; 0 without --with-blocks."""
    store_bytes: int
    """All files of the store when the call ends."""
    elapsed_s: float
    """Seconds from the first forward pass to the last receipt."""

    def __str__(self) -> str:
        """Describe them in one line."""
        states, raw, head, blocks, store = (
            f"{each / 1e6:,.1f} MB"
            for each in (
                self.stored_bytes,
                self.raw_bytes,
                self.head_bytes,
                self.blocks_bytes,
                self.store_bytes,
            )
        )
        return (
            f"states {states} of {raw} raw, head {head}, blocks {blocks}, store {store} in all; "
            f"{show_seconds(self.elapsed_s)}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedBatch:
    """A batch that was run."""

    rows: int
    length: int
    """Tokens of its longest row; the others are padded."""
    seconds: float

    @classmethod
    def of(cls, lengths: NDArray[np.int32], *, seconds: float) -> "TimedBatch":
        """Return the batch of samples of these lengths."""
        return cls(rows=len(lengths), length=int(lengths.max()), seconds=seconds)


class Pilot:
    """Watches the first batches of an extraction, then logs what the whole of it will take."""

    def __init__(
        self,
        root: Path,
        manifest: Manifest,
        lengths: Sequence[NDArray[np.int32]],
        *,
        units: Sequence[int],
        unit_tokens: Sequence[int],
        batch_tokens: int,
    ) -> None:
        """Plan the batches of all units; the plan of the store is written.

        Args:
            root: of the store.
            manifest: of the store.
            lengths: tokens that the base reads for each sample, by unit to compute.
            units: to compute.
            unit_tokens: tokens of the samples of each of them.
            batch_tokens: tokens of a batch, pads included.
        """
        self.prediction: Totals | None = None
        """None until enough batches were run."""
        self._manifest = manifest
        self._units, self._unit_tokens = units, unit_tokens
        self._present = bytes_by_folder(root)
        replaced = (
            file_bytes(root / path)
            for unit in units
            for path in (
                *state_paths(manifest.taps, unit, is_lossy=manifest.is_lossy),
                receipt_path(unit),  # a damaged one
            )
        )
        self._kept_bytes = sum(self._present.values()) - sum(replaced)
        self._timed: list[TimedBatch] = []
        self._unit = units[0]
        self._places: list[NDArray[np.int64]] = []  # row of each state on the token axis
        self._states: dict[str, list[NDArray[Any]]] = {tap: [] for tap in manifest.taps}
        self._planned = PlannedBatches.of(lengths, batch_tokens=batch_tokens)
        count = self._planned.count
        self._awaited = min(PILOT_BATCHES, max(2, count // _PILOT_SHARE), count)
        self._started_at = time.perf_counter()
        self._log_known()

    def begin(self, unit: int) -> None:
        """Count the batches of another unit from now on."""
        self._unit = unit

    def add(
        self, hidden: Mapping[str, NDArray[Any]], rows: NDArray[np.int64], batch: TimedBatch
    ) -> None:
        """Count a batch, and log the prediction after the last one that is awaited.

        Args:
            hidden: states [n, D] of the batch's tokens, by tap.
            rows: [n] row of each in the unit.
            batch: what was run.
        """
        if self.prediction is not None:
            return
        row_bytes = sum(states[:1].nbytes for states in hidden.values())
        most = max(self._manifest.rows_per_chunk, _PILOT_BYTES // (row_bytes * self._awaited))
        order = np.argsort(rows[:most], kind="stable")
        self._places.append(rows[order] + self._unit * self._manifest.unit_tokens)
        for tap, states in hidden.items():
            self._states[tap].append(states[order])
        self._timed.append(batch)
        num_rows = sum(map(len, self._places))
        is_chunk = num_rows >= self._manifest.rows_per_chunk  # a smaller one is compressed worse
        least = 0 if is_chunk else self._planned.count // 2
        if len(self._timed) >= max(self._awaited, least):
            self.prediction = self._predict()
            self._states.clear()
            logger.info(f"predicted: {self.prediction}")

    def _log_known(self) -> None:
        head, blocks, present = (
            f"{each / 1e6:,.1f} MB"
            for each in (
                self._present.get("head", 0),
                self._present.get("blocks", 0),
                self._kept_bytes,
            )
        )
        logger.info(
            f"before the states: head {head}, blocks {blocks}, store {present} in all; their bytes "
            f"and the seconds follow after {self._awaited} or more of {self._planned.count:,} "
            "batches"
        )

    def _predict(self) -> Totals:
        elapsed_s = time.perf_counter() - self._started_at
        started_at = time.perf_counter()
        order = np.argsort(np.concatenate(self._places), kind="stable")
        states = {tap: np.concatenate(rows)[order] for tap, rows in self._states.items()}
        sizes = UnitSizes.measure(self._manifest, states)
        encoding_s = time.perf_counter() - started_at
        stored = [sizes.states_bytes(self._manifest, count) for count in self._unit_tokens]
        receipts = receipt_bytes(self._manifest, self._units[-1]) * len(self._units)
        factors = fit_seconds(self._timed)
        forward_s = self._planned.seconds(factors)
        left_s = max(0.0, forward_s - batch_seconds(factors, shapes_of(self._timed)))
        # A unit is written beside the passes of the next one; only the last is waited for.
        num_encoded = len(next(iter(states.values())))
        write_s = encoding_s / num_encoded * self._unit_tokens[-1]
        return Totals(
            raw_bytes=raw_bytes(self._manifest, sum(self._unit_tokens)),
            stored_bytes=sum(stored),
            head_bytes=self._present.get("head", 0),
            blocks_bytes=self._present.get("blocks", 0),
            store_bytes=self._kept_bytes + sum(stored) + receipts,
            elapsed_s=round(elapsed_s + encoding_s + left_s + write_s, 3),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedBatches:
    """The batches of an extraction."""

    shapes: list[tuple[int, int]]
    """(rows, length) of those of some units."""
    scale: float
    """Tokens of all units, per token of these."""

    @classmethod
    def of(cls, lengths: Sequence[NDArray[np.int32]], *, batch_tokens: int) -> "PlannedBatches":
        """Plan the batches of units with samples of these lengths."""
        some = np.linspace(0, len(lengths) - 1, min(len(lengths), _PLANNED_UNITS)).astype(np.int64)
        chosen = [lengths[unit] for unit in some.tolist()]
        shapes = [shape for each in chosen for shape in _shapes(each, batch_tokens)]
        tokens, planned = (sum(int(each.sum()) for each in units) for units in (lengths, chosen))
        return cls(shapes=shapes, scale=tokens / max(1, planned))

    @property
    def count(self) -> int:
        """Batches of all units, about."""
        return round(len(self.shapes) * self.scale)

    def seconds(self, factors: NDArray[np.float64]) -> float:
        """Return the predicted seconds of all batches."""
        return batch_seconds(factors, self.shapes) * self.scale


def fit_seconds(timed: Sequence[TimedBatch]) -> NDArray[np.float64]:
    """Return seconds per token, per token and length, and per batch; none below 0, [3].

    The first batch is left out where it took longer than it should by the others: it also sets up
    memory and kernels.
    """
    if len(timed) > 2:
        factors = _fit(timed[1:])
        if timed[0].seconds > _WARM_RATIO * batch_seconds(factors, shapes_of(timed[:1])):
            return factors
    return _fit(timed)


def _fit(timed: Sequence[TimedBatch]) -> NDArray[np.float64]:
    seconds = np.array([batch.seconds for batch in timed])
    terms = batch_terms(shapes_of(timed))
    weights = 1 / np.sqrt(np.maximum(seconds, 1e-9))
    best, least = np.zeros(3), np.inf
    for columns in ([0], [0, 1], [0, 2], [0, 1, 2]):
        if len(columns) > max(1, len(timed) - 1):
            continue
        scaled = terms[:, columns] * weights[:, None]
        found = np.linalg.lstsq(scaled, seconds * weights, rcond=None)[0]
        error = float(np.square(scaled @ found - seconds * weights).sum())
        if error < least and bool((found >= 0).all()):
            best, least = np.zeros(3), error
            best[columns] = found
    return best


def batch_seconds(factors: NDArray[np.float64], shapes: Sequence[tuple[int, int]]) -> float:
    """Return the predicted seconds of batches of (rows, length)."""
    return float((batch_terms(shapes) @ factors).sum())


def batch_terms(shapes: Sequence[tuple[int, int]]) -> NDArray[np.float64]:
    """Return n L, n L^2 and 1 for each batch of n rows of L tokens, [B, 3]."""
    rows, length = np.array(shapes, dtype=np.float64).reshape(-1, 2).T
    return np.stack([rows * length, rows * length**2, np.ones_like(rows)], axis=1)


def shapes_of(timed: Sequence[TimedBatch]) -> list[tuple[int, int]]:
    """Return (rows, length) of batches that were run."""
    return [(batch.rows, batch.length) for batch in timed]


def _shapes(lengths: NDArray[np.int32], batch_tokens: int) -> list[tuple[int, int]]:
    """Return (rows, length) of each batch of a unit, the longest first."""
    lengths = lengths[lengths > 0]
    batches = plan_batches(lengths, batch_tokens=batch_tokens)
    return [(len(batch), int(lengths[batch[0]])) for batch in batches]


def spread(batches: list[T]) -> list[T]:
    """Return a unit's batches in an order whose first ones are of all lengths.

    The longest stays first, so that memory runs out at once or not at all.
    """
    last = len(batches) - 1
    order = dict.fromkeys([0, last, last // 2, last - 1, last // 4, *range(len(batches))])
    return [batches[number] for number in order if 0 <= number <= last]
