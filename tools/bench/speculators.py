"""The layout of speculators: one safetensors file a sample, read into packed batches.

Where the package is installed its own sampler, file reader and collator are used; its pins lag
behind current releases of transformers, so it is installed without its requirements:

    pip install "gpt-carry-on[bench]"
    pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0

Elsewhere the same steps, re-typed. Letters: S tokens of a sample, H width, L taps.
"""

import importlib
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from carryon.tools.bench.disk import Charge
from carryon.tools.bench.peer import LoadBatch, Peer, as_bfloat16
from carryon.tools.bench.states import StateSet

NAME = "safetensors"
_PACKED_TOKENS = 4096  # of a batch, unless a sample is longer

Read = Callable[[Path], dict[str, Tensor]]
Collate = Callable[[Sequence[dict[str, Tensor]]], dict[str, Any]]


def speculators() -> Peer:
    """Return the layout, read by the package itself where it can be imported (10 s)."""
    try:
        data = importlib.import_module("speculators.train.data")
        sampler = importlib.import_module("speculators.train.distributed_batch_sampler")
        connectors = importlib.import_module("hs_connectors")
    except ImportError as error:
        return retyped_speculators(reason=str(error))
    return _installed(data, sampler, connectors)


def retyped_speculators(*, reason: str) -> Peer:
    """Return the layout, read by the same steps without the package."""

    def open_files(states: StateSet, folder: Path, charge: Charge) -> LoadBatch:
        most = _packed_tokens(states.lengths)
        return _loader(
            states, folder, charge, load_file, lambda samples: _pack(samples, num_rows=most)
        )

    return Peer(
        name=NAME,
        read_as=f"as speculators, its steps re-typed, as it cannot be imported: {reason}",
        write=_write,
        open=open_files,
        batch=_pack_greedily,
    )


def _installed(data: ModuleType, sampler: ModuleType, connectors: ModuleType) -> Peer:
    def open_files(states: StateSet, folder: Path, charge: Charge) -> LoadBatch:
        files = connectors.FileTransfer(folder)
        most = _packed_tokens(states.lengths)
        collate = data.CollateFn(most, states.width, len(states.taps) - 1)

        def read(path: Path) -> dict[str, Tensor]:
            found: dict[str, Tensor] = files.get_cached(int(path.stem.removeprefix("hs_")))
            return found

        return _loader(states, folder, charge, read, collate)

    def batch(lengths: NDArray[np.int32], random: np.random.Generator) -> list[NDArray[np.int64]]:
        found = sampler.MultipackDistributedBatchSamplerV2(
            batch_max_length=_packed_tokens(lengths),
            lengths=lengths.tolist(),
            num_replicas=1,
            rank=0,
            seed=int(random.integers(1 << 31)),
        )
        return [np.asarray(indices, dtype=np.int64) for indices in found]

    return Peer(
        name=NAME,
        read_as=f"speculators {version('speculators')}: its own sampler, reader and collator",
        write=_write,
        open=open_files,
        batch=batch,
    )


def _write(states: StateSet, folder: Path) -> None:
    for sample in range(len(states.lengths)):
        rows = states.rows_of(sample)
        stacked = torch.stack([as_bfloat16(states.hidden[tap][rows]) for tap in states.taps], dim=1)
        tokens = torch.from_numpy(states.tokens[rows].astype(np.int64))
        staged = folder / f"staged_{sample}"
        save_file({"token_ids": tokens, "hidden_states": stacked}, staged)
        shutil.move(staged, folder / f"hs_{sample}.safetensors")


def _loader(
    states: StateSet, folder: Path, charge: Charge, read: Read, collate: Collate
) -> LoadBatch:
    # There, tokens and masks come from a table of their own, and are compared with the file's.
    tokens = [
        torch.from_numpy(states.tokens[states.rows_of(sample)].astype(np.int64))
        for sample in range(len(states.lengths))
    ]

    def load(batch: NDArray[np.int64]) -> dict[str, Any]:
        found = []
        for sample in batch.tolist():
            path = folder / f"hs_{sample}.safetensors"
            charge(path.stat().st_size)
            tensors = read(path)
            hidden, length = tensors["hidden_states"], len(tokens[sample])
            assert torch.equal(tensors["token_ids"], tokens[sample])
            found.append(
                {
                    "hidden_states": hidden[:, :-1].flatten(1),
                    "input_ids": tensors["token_ids"],
                    "verifier_last_hidden_states": hidden[:, -1],
                    "loss_mask": torch.ones(length, dtype=torch.bool),
                    "lengths": torch.tensor([length]),
                    "position_ids": torch.arange(length),
                }
            )
        return collate(found)

    return load


def _pack(samples: Sequence[dict[str, Tensor]], *, num_rows: int) -> dict[str, Any]:
    """Lay samples one after another in buffers of `num_rows` rows."""
    packed: dict[str, Any] = {}
    for name, first in samples[0].items():
        if name == "lengths":
            continue
        out = torch.zeros((num_rows, *first.shape[1:]), dtype=first.dtype)
        offset = 0
        for sample in samples:
            rows = sample[name]
            out[offset : offset + len(rows)] = rows
            offset += len(rows)
        packed[name] = out.unsqueeze(0)
    lengths = torch.cat([sample["lengths"] for sample in samples])
    documents = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    pads = -torch.ones(num_rows - len(documents), dtype=torch.long)
    packed["document_ids"] = torch.cat([documents, pads]).unsqueeze(0)
    return packed


def _pack_greedily(
    lengths: NDArray[np.int32], random: np.random.Generator
) -> list[NDArray[np.int64]]:
    most = _packed_tokens(lengths)
    batches: list[list[int]] = []
    used = most
    for sample in random.permutation(len(lengths)).tolist():
        if used + int(lengths[sample]) > most:
            batches.append([])
            used = 0
        batches[-1].append(sample)
        used += int(lengths[sample])
    return [np.array(batch, dtype=np.int64) for batch in batches]


def _packed_tokens(lengths: NDArray[np.int32]) -> int:
    return max(_PACKED_TOKENS, int(lengths.max()))
