"""Several processes that train one carry-on, started by `torchrun` or `accelerate launch`.

Each takes samples of every batch, and gradients are summed over all processes: a step is the same,
up to rounding, for any number of processes. Only the first one writes. A single process passes
through these functions unchanged.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """Rank of this process, and how many there are."""

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0


def join_processes(device: str) -> Processes:
    """Join the other processes, if the launcher started any.

    Args:
        device: as in RunSettings; with `cpu` they communicate through gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu")
    return current_processes()


def current_processes() -> Processes:
    """Return this process and how many have joined; one if none have."""
    if not _are_several():
        return Processes(rank=0, size=1)
    return Processes(rank=dist.get_rank(), size=dist.get_world_size())


def wait_for_all() -> None:
    """Return once every process has called this."""
    if _are_several():
        dist.barrier()


def sum_gradients_(weights: Iterable[Tensor]) -> None:
    """Replace each weight's gradient by the sum over all processes, in one message."""
    if not _are_several():
        return
    trained = [weight for weight in weights if weight.requires_grad]
    for weight in trained:
        if weight.grad is None:  # this process had no sample of the step
            weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in trained if weight.grad is not None]
    message = torch.cat([gradient.flatten().float() for gradient in gradients])
    dist.all_reduce(message)
    parts = torch.split(message, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def sum_over_processes(*values: float, device: torch.device) -> list[float]:
    """Return the sums of some numbers over all processes, in float64."""
    if not _are_several():
        return list(values)
    message = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(message)
    return [float(value) for value in message.tolist()]


def gather_lists(values: list[int]) -> list[int]:
    """Return the distinct values of all processes, sorted."""
    if not _are_several():
        return values
    lists: list[list[int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, values)
    return sorted({value for part in lists for value in part or []})


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
