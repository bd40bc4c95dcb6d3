"""StoreDataset: a store as a torch IterableDataset, for probes, draft heads, SAEs and the like.

It reads through the stream that training uses (loader.py). Letters: B samples of a batch, N their
tokens, T tokens of the longest, D base width.
"""

import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset, get_worker_info

from carryon.cache.checked_settings import apply_options
from carryon.cache.errors import InputError
from carryon.train.config import StreamSettings
from carryon.train.data.batch import Batch
from carryon.train.data.datasets import (
    StorePaths,
    iter_store_epoch,
    open_decoded_cache,
    split_store,
    store_paths,
    window_units,
)
from carryon.train.data.loader import Stream
from carryon.train.data.mixture import open_stores
from carryon.train.data.sampler import Window, count_steps, iter_steps, plan_pass
from carryon.train.data.split import sample_units
from carryon.train.saved_settings import refuse_other_settings

NO_TARGET = -100
"""Label of a token that is not a training target: torch's cross_entropy ignores it."""


class StoreDataset(IterableDataset[dict[str, Any]]):
    """Batches of tokens and hidden states, in shuffled or in stored order.

    Example:
        dataset = StoreDataset("store", taps=["final", "layer.15"], batch_tokens=4096)
        for epoch in range(3):
            dataset.set_epoch(epoch)
            for batch in dataset:
                predict(batch["hidden"]["layer.15"], batch["labels"])

    A batch is a dict of tensors:

        input_ids     [N] int64 token ids
        labels        [N] int64: labels[i] is input_ids[i] where token i is a target, else -100.
                      They are not shifted, as transformers expects them; hidden[tap][i] predicts
                      token i + 1. The first token of a sample is never a target.
        hidden        a dict: tap -> [N, D] in the dtype of the store
        position_ids  [N] int64, from 0 in each sample
        cu_seqlens    [B + 1] int32: sample b has the tokens cu_seqlens[b] to cu_seqlens[b + 1]
        sample_ids    [B] int64: indices of the samples; `dataset.store.sample_id` gives their ids

    With `padded=True` the first four are [B, T] and [B, T, D], padded on the right with 0, labels
    with -100, and attention_mask [B, T] int64 takes the place of cu_seqlens.

    An iteration is one pass over the samples. The order depends on `seed` and on the epoch, which
    `set_epoch` sets, as of torch's DistributedSampler. Processes and DataLoader workers take
    different batches of the same order; use `DataLoader(dataset, batch_size=None)`.
    """

    def __init__(
        self,
        store: StorePaths,
        *,
        taps: list[str] | None = None,
        batch_tokens: int = 4096,
        shuffle: bool = True,
        seed: int = 0,
        split: Literal["all", "train", "held_out"] = "all",
        padded: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        """Open and check the store; hidden states are read when it is iterated over.

        Args:
            store: folder of the store, or folders of several that are mixed.
            taps: taps to read. None: all of the store; empty: none.
            batch_tokens: maximum tokens of a batch, without padding; a longer sample is a batch.
            shuffle: shuffle units and the samples within windows of units; else stored order.
            seed: of the shuffle.
            split: samples to read: all, or those that training with the same `held_out_ratio`
                and `data_seed` trains on or holds out.
            padded: pad the samples of a batch to one length.
            rank: of this process. None: from torch.distributed, or the variable RANK, or 0.
            world_size: number of processes. None: in the same way, or 1.
            options: fields of StreamSettings, such as `held_out_ratio=0.1`, `reader_threads=4`.

        Raises:
            InputError: the store lacks a tap, an option is unknown or out of range, or one unit
                does not fit into `host_memory_gb`.
        """
        [stream] = apply_options(options, StreamSettings())
        self.store = open_stores(
            store_paths(store), stream.store_weights, decoded=open_decoded_cache(stream)
        )
        self.taps = list(self.store.taps) if taps is None else list(taps)
        if missing := sorted(set(self.taps) - set(self.store.taps)):
            raise InputError(
                f"taps: expected some of {', '.join(self.store.taps)}, which {self.store.name} "
                f"holds, got {', '.join(missing)}"
            )
        self._stream = replace(
            stream, window_units=window_units(self.store, stream, taps=self.taps)
        )
        self._batch_tokens, self._shuffle, self._seed = batch_tokens, shuffle, seed
        self._split, self._padded = split, padded
        self._rank, self._world_size = _place(rank, world_size)
        self.samples: NDArray[np.int64]
        """Indices of the samples, in stored order."""
        if split == "all":
            self.samples = np.arange(self.store.num_samples)
        elif split in ("train", "held_out"):
            self.samples = getattr(split_store(self.store, stream), split)
        else:
            raise InputError(f"split: expected all, train or held_out, got {split}")
        if batch_tokens < 1:
            raise InputError(f"batch_tokens: expected 1 or more, got {batch_tokens}")
        self._epoch = self._next = 0
        self._worker: list[int] = []
        """Number of the DataLoader worker that `_next` belongs to, and of all; empty: no worker."""
        self._resume: tuple[int, list[int]] = (0, [])
        """Batch to begin the next iteration with, and the worker that saved it."""
        self._planned: tuple[int, list[Window]] | None = None

    def __len__(self) -> int:
        """Return the batches of this process in the epoch."""
        return -(-max(0, count_steps(self._plan()) - self._rank) // self._world_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Return the batches of one pass, or those left of it after `load_state_dict`.

        Raises:
            InputError: the state was saved by another DataLoader worker.
        """
        info = get_worker_info()
        worker = [info.id, info.num_workers] if info else []
        (first, owner), self._resume = self._resume, (0, [])
        if owner and owner != worker:
            raise InputError(
                f"{self.store.name}: the state was saved by worker {owner[0]} of {owner[1]}, got "
                f"{'worker {} of {}'.format(*worker) if worker else 'no worker'}. Fix: load it "
                "with the same num_workers"
            )
        number, stride = worker or (0, 1)
        first += 0 if owner else number
        self._worker = worker
        windows = iter_steps(
            self._iter_plan(),
            first=first * self._world_size + self._rank,
            stride=stride * self._world_size,
        )
        self._next = first
        return self._read(windows, itertools.count(first + stride, stride))

    def _read(
        self, windows: Iterator[Window], positions: Iterator[int]
    ) -> Iterator[dict[str, Any]]:
        reader = Stream(self.store, windows, taps=self.taps, settings=self._stream, is_pinned=False)
        with reader as steps:
            for [batch] in steps:
                self._next = next(positions)
                yield (_pad if self._padded else _flatten)(batch)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch, from its start; the present one changes nothing."""
        if epoch != self._epoch:
            self._epoch, self._next, self._resume = epoch, 0, (0, [])

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, as plain values.

        In a worker it is the worker's position, as torchdata's StatefulDataLoader keeps it.
        """
        return {
            "identity": self._identity(),
            "epoch": self._epoch,
            "batch": self._next,
            "worker": list(self._worker),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which `state_dict` was called, by a seek.

        The batches that follow are the same to the bit. The state of a process without workers
        can be loaded for any number of workers, and by any rank.

        Raises:
            InputError: the state is of another store, order, split or world size; names both
                values.
        """
        refuse_other_settings(state["identity"], self._identity(), name=self.store.name)
        self._epoch = state["epoch"]
        self._next, self._worker = state["batch"], list(state["worker"])
        self._resume = (self._next, self._worker)

    def _identity(self) -> dict[str, Any]:
        """Return what decides the batches of a rank."""
        return {
            "store_fingerprint": self.store.fingerprint,
            "batch_tokens": self._batch_tokens,
            "shuffle": self._shuffle,
            "seed": self._seed,
            "split": self._split,
            "held_out_ratio": self._stream.held_out_ratio,
            "data_seed": self._stream.data_seed,
            "window_units": self._stream.window_units,
            "world_size": self._world_size,
        }

    def _plan(self) -> list[Window]:
        """Return the windows of the epoch, for all processes and workers."""
        if self._planned is None or self._planned[0] != self._epoch:
            self._planned = (self._epoch, list(self._iter_plan()))
        return self._planned[1]

    def _iter_plan(self) -> Iterator[Window]:
        """Yield them, each planned as it is asked for."""
        if self._planned is not None and self._planned[0] == self._epoch:
            return iter(self._planned[1])
        if not self._shuffle:
            return iter(
                plan_pass(
                    self.samples,
                    lengths=self.store.sample_lengths,
                    units=sample_units(self.store),
                    tokens_per_step=self._batch_tokens,
                )
            )
        return iter_store_epoch(
            self.store,
            self.samples,
            seed=self._seed,
            epoch=self._epoch,
            tokens_per_step=self._batch_tokens,
            micro_batch_tokens=0,
            window_units=self._stream.window_units,
            shuffle_seed=self._seed,
        )


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    is_joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank is None:
        rank = torch.distributed.get_rank() if is_joined else int(os.environ.get("RANK", "0"))
    if world_size is None:
        from_env = int(os.environ.get("WORLD_SIZE", "1"))
        world_size = torch.distributed.get_world_size() if is_joined else from_env
    if not 0 <= rank < world_size:
        raise InputError(f"rank: expected 0 to world_size - 1, got {rank} of {world_size}")
    return rank, world_size


def _flatten(batch: Batch) -> dict[str, Any]:
    # In numpy: torch would start its threads for each of these small operations.
    input_ids = batch.tokens.numpy().astype(np.int64)
    labels = np.full_like(input_ids, NO_TARGET)
    labels[batch.positions.numpy() + 1] = batch.targets.numpy()
    bounds = np.concatenate([[0], np.cumsum(batch.lengths)])
    positions = np.arange(len(input_ids)) - np.repeat(bounds[:-1], batch.lengths)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "hidden": batch.states,
        "position_ids": torch.from_numpy(positions),
        "cu_seqlens": torch.from_numpy(bounds.astype(np.int32)),
        "sample_ids": torch.from_numpy(batch.samples),
    }


def _pad(batch: Batch) -> dict[str, Any]:
    flat, sizes = _flatten(batch), batch.lengths.tolist()

    def rows(values_N: Tensor, fill: int = 0) -> Tensor:
        return pad_sequence(
            list(torch.split(values_N, sizes)), batch_first=True, padding_value=fill
        )

    return {
        "input_ids": rows(flat["input_ids"]),
        "labels": rows(flat["labels"], NO_TARGET),
        "hidden": {tap: rows(states) for tap, states in flat["hidden"].items()},
        "position_ids": rows(flat["position_ids"]),
        "attention_mask": rows(torch.ones_like(flat["input_ids"])),
        "sample_ids": flat["sample_ids"],
    }
