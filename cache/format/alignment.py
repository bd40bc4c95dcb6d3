"""The alignment in a store that has another store's rows: which nodes each row sees.

A unit's samples are trees of tokens, one behind the other; the path to a node is what the base
reads for one row. Arrays lie below `aligned/`. Letters: R rows and n nodes of a unit, S samples.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.errors import DamagedStoreError
from carryon.cache.format.arrays import encode_chunks, read_array
from carryon.cache.format.manifest import Manifest
from carryon.cache.format.zarr_metadata import ALIGNED_ARRAYS, TABLE_ROWS

ALIGNMENT_RULES = 2
"""Of which text is known at a row, as a manifest names them. 1, or no name: what the other base
knows may tell how an answer goes on, or the first character of a text."""
_UNUSED = -2
"""Parent of a place behind a unit's last node."""
_NODES = ("tokens", "parents")
_ROWS = ("exact", "stable", "covered", "is_whole")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class UnitAlignment:
    """Trees of a unit's samples, and what each row sees."""

    tokens: NDArray[np.int32]
    """[n] ids of this store's base."""
    parents: NDArray[np.int32]
    """[n] the node before each in the unit, -1 for none; always a lower number."""
    exact: NDArray[np.int32]
    """[R] node of each row whose path is the tokenization of exactly what is known; -1 for none."""
    stable: NDArray[np.int32]
    """[R] the last node on this path that no later text can change; -1 for none."""
    covered: NDArray[np.int32]
    """[R] bytes that are known behind the end of the stable node."""
    is_whole: NDArray[np.uint8]
    """[R] 1 where the exact node ends with the last known byte."""

    def digest(self) -> bytes:
        """Return the SHA-256 of all arrays."""
        digest = hashlib.sha256()
        for name in (*_NODES, *_ROWS):
            values = getattr(self, name)
            digest.update(len(values).to_bytes(8, "little") + values.tobytes())
        return digest.digest()


def encode_alignment(
    units: Sequence[UnitAlignment],
    num_nodes: NDArray[np.int32],
    *,
    unit_tokens: int,
    unit_nodes: int,
) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of each file below `aligned/` but the group's document.

    Args:
        units: all units.
        num_nodes: [S] nodes of each sample.
        unit_tokens: rows of a unit.
        unit_nodes: most nodes of a unit.
    """
    for name in _ROWS:
        rows = (getattr(unit, name) for unit in units)
        shape = (len(units) * unit_tokens,)
        yield from _encode(name, rows, shape, rows_per_chunk=unit_tokens)
    for name in _NODES:
        fill = _UNUSED if name == "parents" else 0
        padded = (_pad(getattr(unit, name), unit_nodes, fill) for unit in units)
        yield from _encode(name, padded, (len(units), unit_nodes), rows_per_chunk=1)
    starts = range(0, len(num_nodes), TABLE_ROWS)
    parts = (num_nodes[start : start + TABLE_ROWS] for start in starts)
    yield from _encode("num_nodes", parts, (len(num_nodes),), rows_per_chunk=TABLE_ROWS)


def read_alignment(root: Path, manifest: Manifest, unit: int) -> UnitAlignment:
    """Read the alignment of a unit.

    Raises:
        DamagedStoreError: a file is not what was written, or a number in it points nowhere.
    """
    rows, digests = manifest.unit_tokens, manifest.files
    values: dict[str, NDArray[Any]] = {
        name: read_array(
            root, f"aligned/{name}", first=unit * rows, stop=(unit + 1) * rows, digests=digests
        )
        for name in _ROWS
    }
    for name in _NODES:
        read = read_array(root, f"aligned/{name}", first=unit, stop=unit + 1, digests=digests)
        values[name] = read.reshape(-1)
    shapes = {name: values[name].shape for name in _ROWS}
    if set(shapes.values()) != {(rows,)} or len(values["tokens"]) != len(values["parents"]):
        raise _damaged(root, unit, f"arrays of {rows} rows, and as many tokens as parents")
    count = int(np.count_nonzero(values["parents"] != _UNUSED))
    found = UnitAlignment(
        **{name: value[:count] if name in _NODES else value for name, value in values.items()}
    )
    nodes = np.arange(count)
    is_sound = (
        (found.parents >= -1).all()
        and (found.parents < nodes).all()
        and all(((x >= -1) & (x < count)).all() for x in (found.exact, found.stable))
        and (found.covered >= 0).all()
        and (found.is_whole <= 1).all()
        and ((found.tokens >= 0) & (found.tokens < manifest.head["vocab_size"])).all()
    )
    if not is_sound:
        raise _damaged(root, unit, f"nodes of its {count} tokens")
    return found


def read_trees(
    root: Path,
    manifest: Manifest,
    unit: int,
    *,
    num_nodes: NDArray[np.int32],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int32],
) -> UnitAlignment:
    """Read the alignment of a unit, and check that each sample sees its own tree only.

    Args:
        root: of the store.
        manifest: of the store.
        unit: number.
        num_nodes: [s] nodes of each sample of the unit.
        starts: [s] first row of each within the unit.
        lengths: [s] rows of each.

    Raises:
        DamagedStoreError: as `read_alignment`, or a path leaves its tree, or there are more or
            fewer nodes.
    """
    alignment = read_alignment(root, manifest, unit)
    stops = np.cumsum(num_nodes, dtype=np.int64)
    if int(num_nodes.sum(dtype=np.int64)) != len(alignment.tokens):
        raise _damaged(root, unit, "as many nodes as its samples have")
    firsts = stops - num_nodes
    is_inside = (alignment.parents == -1) | (alignment.parents >= np.repeat(firsts, num_nodes))
    low, high = (np.zeros(len(alignment.exact), dtype=np.int64) for _ in range(2))
    for first, stop, start, length in zip(firsts, stops, starts, lengths, strict=True):
        low[start : start + length], high[start : start + length] = first, stop
    is_own = [(x == -1) | ((x >= low) & (x < high)) for x in (alignment.exact, alignment.stable)]
    if not is_inside.all() or not all(each.all() for each in is_own):
        raise _damaged(root, unit, "nodes of each sample's own tree")
    return alignment


def read_num_nodes(root: Path, manifest: Manifest) -> NDArray[np.int32]:
    """Return, [S], the nodes of each sample."""
    found: NDArray[np.int32] = read_array(root, "aligned/num_nodes", digests=manifest.files)
    if found.shape != (manifest.num_samples,) or (found < 0).any():
        raise DamagedStoreError(
            f"{root}: aligned: expected nodes of {manifest.num_samples} samples",
            fix="extract into another folder",
        )
    return found


def _damaged(root: Path, unit: int, expected: str) -> DamagedStoreError:
    return DamagedStoreError(
        f"{root}: aligned: unit {unit}: expected {expected}, got others",
        fix="extract into another folder",
    )


def _encode(
    name: str, rows: Iterable[NDArray[Any]], shape: tuple[int, ...], *, rows_per_chunk: int
) -> Iterator[tuple[str, bytes]]:
    return encode_chunks(
        f"aligned/{name}",
        rows,
        shape=shape,
        dtype=np.dtype(ALIGNED_ARRAYS[name]),
        rows_per_chunk=rows_per_chunk,
    )


def _pad(values: NDArray[np.int32], size: int, fill: int) -> NDArray[np.int32]:
    """Return [1, size] values with `fill` behind them."""
    padded = np.full((1, size), fill, dtype=np.int32)
    padded[0, : len(values)] = values
    return padded
