"""Layouts of other projects that keep hidden states on disk, and their batches.

Each is written and read as its project does it, re-typed except where noted, without worker
processes. Letters: S tokens of a sample, H width, L taps.

- `safetensors`: speculators, one file a sample, packed batches. If the package is installed, its
  own sampler, reader and collator are used. Its pins lag behind transformers, so install it with
  `pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0` after the extra `bench`.
- `torch_save` and `torch_save_padded`: SpecForge, one `torch.save` file a sample, padded batches.
- `raw_map` and `raw_map_straight`: DeepSpec, all samples in one mapped file, padded batches.
  Nothing is decoded or checked, so it bounds reading from the page cache.
"""

import importlib
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
from carryon.tools.bench.states import StateSet

LoadBatch = Callable[[NDArray[np.int64]], dict[str, Any]]
"""Reads some samples and returns them as one batch, ready for a device."""
ReadSample = Callable[[int], dict[str, Tensor]]
"""Reads one sample, each tensor [1, S, ...]."""
Batches = list[NDArray[np.int64]]

_BATCH_SAMPLES = 4
"""Samples of a padded batch."""
_PACKED_TOKENS = 4096
"""Tokens of a packed batch, unless a sample is longer."""
_DUMP_SAMPLES = 32
"""Samples that SpecForge dumps together by default, padded to the longest of them."""
_RECORD = struct.Struct("<7q")
"""DeepSpec: sample, shard, length, and offsets of tokens, mask, lower taps, last tap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One way to keep hidden states."""

    name: str
    read_as: str
    """How it is read, in words."""
    write: Callable[[StateSet, Path], None]
    """Writes all samples below a new folder."""
    open: Callable[[StateSet, Path, Charge], LoadBatch]
    """Opens the written files; each read is charged before it happens."""
    batch: Callable[[NDArray[np.int32], np.random.Generator], Batches]
    """Groups samples of these lengths into batches, in random order, for one epoch."""
    is_limit: bool = False
    """An upper bound of a layout's speed from the page cache, not a competitor."""


def list_peers() -> list[Peer]:
    """Return all layouts; importing speculators takes 10 s where it is installed."""
    return [
        speculators(),
        specforge(has_padding=False),
        specforge(has_padding=True),
        deepspec(is_straight=False),
        deepspec(is_straight=True),
    ]


def speculators() -> Peer:
    """Return the layout of speculators, read by the package itself where it can be imported."""
    try:
        data = importlib.import_module("speculators.train.data")
        sampler = importlib.import_module("speculators.train.distributed_batch_sampler")
        connectors = importlib.import_module("hs_connectors")
    except ImportError as error:
        return retyped_speculators(reason=str(error))
    return _installed_speculators(data, sampler, connectors)


def retyped_speculators(*, reason: str) -> Peer:
    """Return the layout of speculators, read by the same steps without the package."""

    def open_files(states: StateSet, folder: Path, charge: Charge) -> LoadBatch:
        collate = partial(_pack, num_rows=_packed_tokens(states.lengths))
        return _speculators_loader(states, folder, charge, load_file, collate)

    return Peer(
        name="safetensors",
        read_as=f"speculators, its steps re-typed, because it cannot be imported: {reason}",
        write=_write_safetensors,
        open=open_files,
        batch=_pack_greedily,
    )


def _installed_speculators(data: ModuleType, sampler: ModuleType, connectors: ModuleType) -> Peer:
    def open_files(states: StateSet, folder: Path, charge: Charge) -> LoadBatch:
        files = connectors.FileTransfer(folder)
        collate = data.CollateFn(_packed_tokens(states.lengths), states.width, len(states.taps) - 1)

        def read(path: Path) -> dict[str, Tensor]:
            tensors: dict[str, Tensor] = files.get_cached(int(path.stem.removeprefix("hs_")))
            return tensors

        return _speculators_loader(states, folder, charge, read, collate)

    def batch(lengths: NDArray[np.int32], random: np.random.Generator) -> Batches:
        batches = sampler.MultipackDistributedBatchSamplerV2(
            batch_max_length=_packed_tokens(lengths),
            lengths=lengths.tolist(),
            num_replicas=1,
            rank=0,
            seed=int(random.integers(1 << 31)),
        )
        return [np.asarray(indices, dtype=np.int64) for indices in batches]

    return Peer(
        name="safetensors",
        read_as=f"speculators {version('speculators')}: its own sampler, reader and collator",
        write=_write_safetensors,
        open=open_files,
        batch=batch,
    )


def _write_safetensors(states: StateSet, folder: Path) -> None:
    for sample in range(len(states.lengths)):
        hidden = torch.stack([states.tensor(tap, sample) for tap in states.taps], dim=1)
        staged = folder / f"staged_{sample}"
        save_file({"token_ids": states.token_ids(sample), "hidden_states": hidden}, staged)
        shutil.move(staged, folder / f"hs_{sample}.safetensors")


def _speculators_loader(
    states: StateSet,
    folder: Path,
    charge: Charge,
    read: Callable[[Path], dict[str, Tensor]],
    collate: Callable[[Sequence[dict[str, Tensor]]], dict[str, Any]],
) -> LoadBatch:
    # speculators takes tokens and masks from a separate table and compares them with the file's.
    tokens = [states.token_ids(sample) for sample in range(len(states.lengths))]

    def load(batch: NDArray[np.int64]) -> dict[str, Any]:
        samples = []
        for sample in batch.tolist():
            path = folder / f"hs_{sample}.safetensors"
            charge(path.stat().st_size)
            tensors = read(path)
            hidden, length = tensors["hidden_states"], len(tokens[sample])
            assert torch.equal(tensors["token_ids"], tokens[sample])
            samples.append(
                {
                    "hidden_states": hidden[:, :-1].flatten(1),
                    "input_ids": tensors["token_ids"],
                    "verifier_last_hidden_states": hidden[:, -1],
                    "loss_mask": torch.ones(length, dtype=torch.bool),
                    "lengths": torch.tensor([length]),
                    "position_ids": torch.arange(length),
                }
            )
        return collate(samples)

    return load


def _pack(samples: Sequence[dict[str, Tensor]], *, num_rows: int) -> dict[str, Any]:
    """Concatenate samples in buffers of `num_rows` rows."""
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
    padding = -torch.ones(num_rows - len(documents), dtype=torch.long)
    packed["document_ids"] = torch.cat([documents, padding]).unsqueeze(0)
    return packed


def _pack_greedily(lengths: NDArray[np.int32], random: np.random.Generator) -> Batches:
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


def specforge(*, has_padding: bool) -> Peer:
    """Return the layout of SpecForge as dumped by default, or sample by sample."""
    return Peer(
        name="torch_save_padded" if has_padding else "torch_save",
        read_as="SpecForge: torch.load mapped, every tensor cloned, padded batches"
        + (", padding on disk" if has_padding else ""),
        write=partial(_write_torch_save, dump_samples=_DUMP_SAMPLES if has_padding else 1),
        open=_open_torch_save,
        batch=_random_batches,
    )


def _write_torch_save(states: StateSet, folder: Path, *, dump_samples: int) -> None:
    order = np.random.default_rng(0).permutation(len(states.lengths))
    for first in range(0, len(order), dump_samples):
        dumped = order[first : first + dump_samples]
        longest = int(states.lengths[dumped].max())
        for sample in dumped.tolist():
            mask = torch.zeros(1, longest, dtype=torch.int64)
            mask[:, : int(states.lengths[sample])] = 1
            # SpecForge runs the base on the padding; here it is zeros of the same size.
            record = _stacked([_record(states, sample)], longest) | {"loss_mask": mask}
            torch.save(record, folder / f"data_{sample}.ckpt")


def _record(states: StateSet, sample: int) -> dict[str, Tensor]:
    *lower, last = [states.tensor(tap, sample)[None] for tap in states.taps]
    record = {"input_ids": states.token_ids(sample)[None], "hidden_state": last}
    return record | ({"aux_hidden_state": torch.cat(lower, dim=2)} if lower else {})


def _open_torch_save(states: StateSet, folder: Path, charge: Charge) -> LoadBatch:
    def read(sample: int) -> dict[str, Tensor]:
        path = folder / f"data_{sample}.ckpt"
        charge(path.stat().st_size)
        # Unrestricted, as SpecForge does it; these files are ours.
        record = torch.load(path, mmap=True, weights_only=False)
        return {name: tensor.clone() for name, tensor in record.items()}

    return _padded_loader(read)


def _random_batches(lengths: NDArray[np.int32], random: np.random.Generator) -> Batches:
    order = random.permutation(len(lengths))
    return [order[first : first + _BATCH_SAMPLES] for first in range(0, len(order), _BATCH_SAMPLES)]


def _padded_loader(read: ReadSample) -> LoadBatch:
    def load(batch: NDArray[np.int64]) -> dict[str, Any]:
        samples = [read(sample) for sample in batch.tolist()]
        return _stacked(samples, max(sample["input_ids"].shape[1] for sample in samples))

    return load


def _stacked(samples: Sequence[dict[str, Tensor]], num_rows: int) -> dict[str, Any]:
    """Stack samples [1, S, ...], padded on the right to `num_rows`."""
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        out = first.new_zeros((len(samples), num_rows, *first.shape[2:]))
        for row, sample in zip(out, samples, strict=True):
            row[: sample[name].shape[1]] = sample[name][0]
        batch[name] = out
    return batch


def deepspec(*, is_straight: bool) -> Peer:
    """Return the layout of DeepSpec: every tensor copied, then padded, as it does.

    Args:
        is_straight: copy from the map straight into batches, the least work possible.
    """
    return Peer(
        name="raw_map_straight" if is_straight else "raw_map",
        read_as="the files of raw_map, copied straight into padded batches"
        if is_straight
        else "DeepSpec: mapped, every tensor copied, padded batches",
        write=_write_raw,
        open=partial(_open_raw, copies=not is_straight),
        batch=_random_batches,
        is_limit=True,
    )


def _write_raw(states: StateSet, folder: Path) -> None:
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


def _open_raw(states: StateSet, folder: Path, charge: Charge, *, copies: bool) -> LoadBatch:
    index = [*_RECORD.iter_unpack((folder / "samples.idx").read_bytes())]
    # Copy on write: torch takes writable memory only.
    mapped = torch.from_numpy(np.memmap(folder / "shard-00000.bin", dtype=np.uint8, mode="c"))
    width, num_lower = states.width, len(states.taps) - 1

    def views(sample: int) -> Iterator[tuple[str, Tensor]]:
        _, _, length, *offsets = index[sample]
        charge(length * (5 + 2 * width * (1 + num_lower)))
        parts: list[tuple[str, torch.dtype, tuple[int, ...]]] = [
            ("input_ids", torch.int32, (1, length)),
            ("loss_mask", torch.uint8, (1, length)),
            ("aux_hidden_state", torch.bfloat16, (1, length, num_lower * width)),
            ("hidden_state", torch.bfloat16, (1, length, width)),
        ]
        for (name, dtype, shape), offset in zip(parts, offsets, strict=True):
            num_bytes = int(np.prod(shape)) * dtype.itemsize
            if num_bytes:
                yield name, mapped[offset : offset + num_bytes].view(dtype).reshape(shape)

    def read(sample: int) -> dict[str, Tensor]:
        return {name: part.clone() if copies else part for name, part in views(sample)}

    return _padded_loader(read)
