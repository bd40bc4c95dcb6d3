"""The layout of DeepSpec: all samples one after another in one file, mapped; padded batches.

Re-typed from the project, without its worker processes. It is the limit for reading from memory:
nothing is decoded and nothing is checked. Letters: S tokens of a sample, H width.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carryon.tools.bench.disk import Charge
from carryon.tools.bench.peer import LoadBatch, Peer, as_bfloat16, random_batches
from carryon.tools.bench.states import StateSet

_RECORD = struct.Struct("<7q")
"""Sample, shard, length, and offsets of tokens, mask, lower taps, last tap."""


def deepspec() -> Peer:
    """Return the layout as the project reads it: every tensor is copied, then padded."""
    return Peer(
        name="raw_map",
        read_as="DeepSpec: mapped, every tensor copied, padded batches",
        write=_write,
        open=lambda states, folder, charge: _open(states, folder, charge, copies=True),
        batch=random_batches,
        is_limit=True,
    )


def raw_map_straight() -> Peer:
    """Return the same files copied straight into batches: the least work there can be."""
    return Peer(
        name="raw_map_straight",
        read_as="the files of raw_map, copied straight into padded batches",
        write=_write,
        open=lambda states, folder, charge: _open(states, folder, charge, copies=False),
        batch=random_batches,
        is_limit=True,
    )


def _write(states: StateSet, folder: Path) -> None:
    records = []
    with (folder / "shard-00000.bin").open("wb") as file:
        for sample in range(len(states.lengths)):
            rows, length = states.rows_of(sample), int(states.lengths[sample])
            lower = [states.hidden[tap][rows] for tap in states.taps[:-1]]
            parts: tuple[NDArray[Any], ...] = (
                states.tokens[rows],
                np.ones(length, dtype=np.uint8),
                np.concatenate(lower, axis=1) if lower else np.zeros(0, dtype=np.uint16),
                states.hidden[states.taps[-1]][rows],
            )
            offsets = []
            for part in parts:
                file.write(b"\0" * (-file.tell() % 4))
                offsets.append(file.tell())
                file.write(np.ascontiguousarray(part).data)
            records.append(_RECORD.pack(sample, 0, length, *offsets))
    (folder / "samples.idx").write_bytes(b"".join(records))


def _open(states: StateSet, folder: Path, charge: Charge, *, copies: bool) -> LoadBatch:
    index = [*_RECORD.iter_unpack((folder / "samples.idx").read_bytes())]
    mapped = np.memmap(folder / "shard-00000.bin", dtype=np.uint8, mode="r")
    width, num_lower = states.width, len(states.taps) - 1

    def views(sample: int) -> Iterator[tuple[str, NDArray[Any]]]:
        _, _, length, *offsets = index[sample]
        charge(length * (5 + 2 * width * (1 + num_lower)))
        parts: list[tuple[str, type[np.generic], tuple[int, ...]]] = [
            ("input_ids", np.int32, (1, length)),
            ("loss_mask", np.uint8, (1, length)),
            ("aux_hidden_state", np.uint16, (1, length, num_lower * width)),
            ("hidden_state", np.uint16, (1, length, width)),
        ]
        for (name, dtype, shape), offset in zip(parts, offsets, strict=True):
            num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            if num_bytes:
                yield name, mapped[offset : offset + num_bytes].view(dtype).reshape(shape)

    def load(batch: NDArray[np.int64]) -> dict[str, Any]:
        found = [dict(views(sample)) for sample in batch.tolist()]
        if copies:
            found = [{name: part.copy() for name, part in parts.items()} for parts in found]
        longest = max(parts["input_ids"].shape[1] for parts in found)
        ready: dict[str, Any] = {}
        for name, first in found[0].items():
            out = np.zeros((len(found), longest, *first.shape[2:]), dtype=first.dtype)
            for row, parts in zip(out, found, strict=True):
                row[: parts[name].shape[1]] = parts[name][0]
            ready[name] = as_bfloat16(out) if out.dtype == np.uint16 else torch.from_numpy(out)
        return ready

    return load
