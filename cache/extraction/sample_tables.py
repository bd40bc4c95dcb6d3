"""The tables of samples in a store: place, length, id, group and role of each.

They are encoded chunk by chunk, so memory does not grow with ids of many millions of samples.
Letters: S samples of the corpus, n rows of a chunk.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.samples import SampleTable
from carryon.cache.errors import InputError
from carryon.cache.extraction.packing import UnitPlan
from carryon.cache.format.arrays import array_info, encode_chunks, read_array
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.zarr_metadata import TABLE_ROWS

_MIN_ID_BYTES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class _Table:
    """An array with a row for each sample, or for each unit."""

    name: str
    num_rows: int
    """Rows that are added."""
    dtype: np.dtype[Any]
    width: tuple[int, ...] = ()
    """Shape of a row."""
    read: Callable[[int, int], NDArray[Any]]
    """Returns rows that are added, from the first number to before the second."""


def encode_tables(
    samples: SampleTable, plan: UnitPlan, *, manifest: Manifest, root: Path | None = None
) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of the tables' files that hold samples of the last part.

    Args:
        samples: of the last part.
        plan: where each of them lies.
        manifest: of the store with this part.
        root: of the store that the part is appended to. None: a new store.

    Raises:
        DamagedStoreError: a chunk that is continued is not the one that was written.
    """
    part = manifest.parts[-1]
    id_bytes = (
        array_info(root, "samples/id", digests=manifest.files).chunk[1]
        if root
        else _id_bytes(samples)
    )
    for table in _tables(samples, plan, manifest=manifest, id_bytes=id_bytes):
        first = part.first_unit if table.name == "units" else part.first_sample
        is_new = root is None or f"{table.name}/zarr.json" not in manifest.files
        first_chunk = 0 if is_new else first // TABLE_ROWS
        stop = first + table.num_rows
        yield from encode_chunks(
            table.name,
            (
                _rows(table, low, min(low + TABLE_ROWS, stop), first, manifest, root)
                for low in range(first_chunk * TABLE_ROWS, stop, TABLE_ROWS)
            ),
            shape=(stop, *table.width),
            dtype=table.dtype,
            rows_per_chunk=TABLE_ROWS,
            first_chunk=first_chunk,
        )


def refuse_known_ids(root: Path, manifest: Manifest, samples: SampleTable) -> None:
    """Check that the ids of samples fit into a store, and are not in it.

    Raises:
        InputError: an id is too long, or exists already.
    """
    width = array_info(root, "samples/id", digests=manifest.files).chunk[1]
    if (needed := _id_bytes(samples)) > width:
        raise InputError(
            f"sample ids: this store keeps {width} bytes for an id, got one that needs {needed}: "
            "use shorter ids"
        )
    known = np.concatenate([_hash_rows(rows) for rows in _stored_ids(root, manifest)])
    added = np.concatenate(
        [np.empty(0, np.uint64), *(_hash_rows(_id_rows(x, width)) for x in samples.iter_ids())]
    )
    for index in np.flatnonzero(np.isin(added, known)).tolist():
        [name] = samples.ids([index])
        for place in np.flatnonzero(known == added[index]).tolist():  # one, or equal hashes
            row = read_array(
                root, "samples/id", first=place, stop=place + 1, digests=manifest.files
            )
            if row.tobytes().rstrip(b"\0").decode() == name:
                raise InputError(
                    f"sample {name!r}: a sample with this id is in the store already: "
                    "give every sample a different id"
                )


def _tables(
    samples: SampleTable, plan: UnitPlan, *, manifest: Manifest, id_bytes: int
) -> list[_Table]:
    """Return what the last part of a manifest adds to each table."""
    order = plan.order
    lengths = samples.lengths[order]
    tokens = np.bincount(plan.unit, weights=lengths, minlength=plan.num_units)
    first_row = manifest.parts[-1].first_unit * manifest.unit_tokens

    def ids(low: int, high: int) -> NDArray[np.uint8]:
        return _id_rows(samples.ids(order[low:high].tolist()), id_bytes)

    columns: dict[str, NDArray[Any]] = {
        "samples/start": plan.start + first_row,
        "samples/length": lengths,
        "samples/held_out": samples.held_out[order].astype(np.uint8),
        "samples/group": samples.groups[order],
        "samples/role": samples.roles[order],
        "units": tokens.astype(np.int32),
    }
    tables = [
        _Table(name=name, num_rows=len(rows), dtype=rows.dtype, read=_slicer(rows))
        for name, rows in columns.items()
    ]
    kind = np.dtype(np.uint8)
    table = _Table(name="samples/id", num_rows=len(order), dtype=kind, width=(id_bytes,), read=ids)
    return [*tables, table]


def _slicer(rows: NDArray[Any]) -> Callable[[int, int], NDArray[Any]]:
    return lambda low, high: rows[low:high]


def _rows(
    table: _Table, low: int, high: int, first: int, manifest: Manifest, root: Path | None
) -> NDArray[Any]:
    """Return rows `low` to `high` of a table whose rows from `first` on are added."""
    parts = []
    if low < first and root is not None:
        stop = min(high, first)
        if f"{table.name}/zarr.json" in manifest.files:
            rows = read_array(root, table.name, first=low, stop=stop, digests=manifest.files)
        else:  # a store from before there were groups and roles, read in this way too
            is_group = table.name == "samples/group"
            rows = (np.arange(low, stop) if is_group else np.zeros(stop - low)).astype(table.dtype)
        parts.append(rows)
    if high > first:
        parts.append(table.read(max(low, first) - first, high - first))
    return np.concatenate(parts)


def _stored_ids(root: Path, manifest: Manifest) -> Iterator[NDArray[np.uint8]]:
    """Yield the rows of a store's ids, [n, bytes], chunk by chunk."""
    size = array_info(root, "samples/id", digests=manifest.files).chunk[0]
    num_samples = manifest.num_samples
    for low in range(0, num_samples, size):
        stop = min(low + size, num_samples)
        yield read_array(root, "samples/id", first=low, stop=stop, digests=manifest.files)


def _id_bytes(samples: SampleTable) -> int:
    """Return the bytes of a row that holds every id: a multiple of 16."""
    return max(_MIN_ID_BYTES, -(-samples.longest_id() // 16) * 16)


def _id_rows(ids: list[str], id_bytes: int) -> NDArray[np.uint8]:
    """Return ids in UTF-8, padded with zeros, [n, id_bytes]."""
    names = np.array([name.encode() for name in ids], dtype=f"S{id_bytes}")
    return names.view(np.uint8).reshape(-1, id_bytes)


def _hash_rows(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each row, [n]."""
    words = np.ascontiguousarray(rows).view(np.uint64)
    random = np.random.default_rng(0)
    odd: NDArray[np.uint64] = random.integers(1 << 63, size=words.shape[1:], dtype=np.uint64)
    odd = odd * np.uint64(2) + np.uint64(1)
    mixed = words * odd  # wraps
    mixed ^= mixed >> np.uint64(32)
    return np.asarray((mixed * odd[::-1]).sum(axis=1, dtype=np.uint64))
