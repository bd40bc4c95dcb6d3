"""The layout of SpecForge: one torch.save file a sample, with or without pads, padded batches.

Re-typed from the project. Letters: S tokens of a sample, H width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from carryon.tools.bench.disk import Charge
from carryon.tools.bench.peer import LoadBatch, Peer, as_bfloat16, random_batches
from carryon.tools.bench.states import StateSet

_DUMP_SAMPLES = 32
"""Samples that it dumps at one time by default, each padded to the longest of them."""


def specforge(*, has_pads: bool) -> Peer:
    """Return the layout as it is dumped by default, or sample by sample, without pads."""
    dump_samples = _DUMP_SAMPLES if has_pads else 1
    return Peer(
        name="torch_save_padded" if has_pads else "torch_save",
        read_as="SpecForge: torch.load mapped, every tensor cloned, padded batches"
        + (", pads on disk" if has_pads else ""),
        write=lambda states, folder: _write(states, folder, dump_samples=dump_samples),
        open=_open,
        batch=random_batches,
    )


def _write(states: StateSet, folder: Path, *, dump_samples: int) -> None:
    order = np.random.default_rng(0).permutation(len(states.lengths))
    for first in range(0, len(order), dump_samples):
        dumped = order[first : first + dump_samples]
        longest = int(states.lengths[dumped].max())
        for sample in dumped.tolist():
            rows = states.rows_of(sample)
            mask = torch.zeros(1, longest, dtype=torch.int64)
            mask[:, : int(states.lengths[sample])] = 1
            tokens = torch.from_numpy(states.tokens[rows].astype(np.int64))
            last = as_bfloat16(states.hidden[states.taps[-1]][rows])
            record = {
                "input_ids": _padded(tokens, longest),
                "loss_mask": mask,
                "hidden_state": _padded(last, longest),
            }
            if len(states.taps) > 1:
                lower = [as_bfloat16(states.hidden[tap][rows]) for tap in states.taps[:-1]]
                record["aux_hidden_state"] = _padded(torch.cat(lower, dim=1), longest)
            torch.save(record, folder / f"data_{sample}.ckpt")


def _padded(rows: Tensor, num_rows: int) -> Tensor:
    # There the pads are run through the base like tokens; here zeros of the same size.
    out = rows.new_zeros((1, num_rows, *rows.shape[1:]))
    out[0, : len(rows)] = rows
    return out


def _open(states: StateSet, folder: Path, charge: Charge) -> LoadBatch:
    def load(batch: NDArray[np.int64]) -> dict[str, Any]:
        found = []
        for sample in batch.tolist():
            path = folder / f"data_{sample}.ckpt"
            charge(path.stat().st_size)
            # Unrestricted, as it does; these files are our own.
            record = torch.load(path, mmap=True, weights_only=False)
            found.append({name: tensor.clone() for name, tensor in record.items()})
        return _stack(found)

    return load


def _stack(samples: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Put samples [1, S, ...] side by side, padded on the right to the longest."""
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    ready: dict[str, Any] = {}
    for name, first in samples[0].items():
        out = first.new_zeros((len(samples), longest, *first.shape[2:]))
        for row, sample in zip(out, samples, strict=True):
            row[: sample[name].shape[1]] = sample[name][0]
        ready[name] = out
    return ready
