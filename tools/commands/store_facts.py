"""Facts about a store as plain JSON values: provenance, counts, bytes on disk."""

from collections import Counter
from pathlib import Path
from typing import Any

from carryon.cache.store.reader import Store


def describe_store(store: Store) -> dict[str, Any]:
    """Return what is worth knowing about a store; reads no hidden state."""
    manifest = store.manifest
    counts: Counter[str] = Counter()
    for part in manifest.parts:
        counts.update(part.counts)
    sizes = measure_arrays(store.root)
    raw_bytes = finished_tokens(store) * store.width * store.states_dtype.itemsize
    return {
        "store": str(store.root),
        "fingerprint": store.fingerprint,
        "base": manifest.base,
        "forward": manifest.forward,
        "taps": store.taps,
        "width": store.width,
        "dtype": manifest.settings["dtype"],
        "profile": manifest.settings["profile"],
        "profile_error": manifest.profile_error,
        "head": manifest.head,
        "seed": manifest.settings["seed"],
        "units": store.num_units,
        "finished_units": len(store.finished_units),
        "unit_tokens": manifest.unit_tokens,
        "samples": store.num_samples,
        "held_out_samples": int(store.sample_held_out.sum()),
        "tokens": store.num_tokens,
        "supervised_tokens": manifest.num_supervised,
        "corpus": manifest.corpus,
        "counts": dict(counts),
        "files": [file for part in manifest.parts for file in part.files],
        "bytes": sum(sizes.values()),
        "array_bytes": sizes,
        "raw_bytes_per_tap": raw_bytes,
        "ratio_to_raw": {
            tap: round(tap_bytes(sizes, tap) / raw_bytes, 4) if raw_bytes else None
            for tap in store.taps
        },
        "versions": manifest.versions,
    }


def measure_arrays(root: Path) -> dict[str, int]:
    """Return the bytes on disk of each array; `units` are the receipts and the copies that
    repair uses, `documents` all else."""
    sizes: Counter[str] = Counter()
    for path in root.rglob("*"):
        if path.is_file():
            name = path.relative_to(root).as_posix()
            array, is_chunk, _ = name.partition("/c/")
            if name.startswith("units/"):
                array = "units"
            elif not is_chunk:
                array = "documents"
            sizes[array] += path.stat().st_size
    return dict(sorted(sizes.items()))


def tap_bytes(sizes: dict[str, int], tap: str) -> int:
    """Return the bytes of a tap's states, with the scales that a lossy profile needs."""
    arrays = (f"hidden/{tap}", f"scale/token/{tap}", f"scale/channel/{tap}")
    return sum(sizes.get(name, 0) for name in arrays)


def finished_tokens(store: Store) -> int:
    """Return the tokens of the units that are extracted."""
    if len(store.finished_units) == store.num_units:
        return store.num_tokens
    return sum(store.receipt(unit).num_tokens for unit in store.finished_units)
