"""Report of an extraction: units, bytes, seconds, and the stage that was the limit."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from carryon.cache.extraction.prediction import Totals
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.receipt import Receipt
from carryon.cache.format.zarr_metadata import state_paths
from carryon.cache.store.sizes import bytes_by_folder, raw_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractReport:
    """Summary of an extraction."""

    store: str
    fingerprint: str
    num_units: int
    num_tokens: int
    computed_units: int
    """Units computed since this call began, by it or beside it; the others had a receipt."""
    computed_tokens: int
    raw_bytes: int
    """Hidden states of the units computed, before compression, without unused rows."""
    stored_bytes: int
    """The same in the store, with the scales of a lossy profile."""
    head_bytes: int
    """LM head and final norm in the store."""
    blocks_bytes: int
    """The base's last blocks in the store."""
    store_bytes: int
    """All files of the store."""
    elapsed_s: float
    """Seconds from the first forward pass to the last receipt."""
    is_finished: bool
    """False when the disk limit ended it."""
    limit: str = ""
    """The stage that held up the others: `read`, `forward`, `encode` or `write`; of several
    processes, in the one that reports."""
    stage_s: dict[str, float] = field(default_factory=dict)
    """Seconds of the forward passes, and those that they waited for each other stage."""
    predicted: Totals | None = None
    """The same quantities, predicted from the first batches. None: nothing was left to compute,
    other processes shared it, or the disk limit ended it before."""

    @property
    def written(self) -> Totals:
        """The quantities of a prediction, as they were."""
        values = {item.name: getattr(self, item.name) for item in fields(Totals)}
        return Totals(**values)


def summarize(
    root: Path,
    manifest: Manifest,
    receipts: Sequence[Receipt],
    *,
    elapsed_s: float,
    is_finished: bool,
) -> ExtractReport:
    """Return the report of an extraction that has written these receipts."""
    tokens, present = sum(receipt.num_tokens for receipt in receipts), bytes_by_folder(root)
    return ExtractReport(
        store=str(root),
        fingerprint=manifest.fingerprint,
        num_units=manifest.num_units,
        num_tokens=manifest.num_tokens,
        computed_units=len(receipts),
        computed_tokens=tokens,
        raw_bytes=raw_bytes(manifest, tokens),
        stored_bytes=sum(stored_bytes(manifest, receipt) for receipt in receipts),
        head_bytes=present.get("head", 0),
        blocks_bytes=present.get("blocks", 0),
        store_bytes=sum(present.values()),
        elapsed_s=round(elapsed_s, 3),
        is_finished=is_finished,
    )


def stored_bytes(manifest: Manifest, receipt: Receipt) -> int:
    """Return the bytes of a unit's hidden states in the store."""
    paths = state_paths(manifest.taps, receipt.unit, is_lossy=manifest.is_lossy)
    return sum(receipt.files[path].bytes for path in paths)
