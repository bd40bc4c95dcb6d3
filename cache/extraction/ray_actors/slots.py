"""How many actors a cluster has room for, from what its nodes offer. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from carryon.cache.errors import InputError

Node = Mapping[str, float]
"""Resources of a node that is alive, as Ray names them: `CPU`, `GPU`, ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """What Ray reserves for one actor."""

    cpus: int
    """Its threads, too."""
    gpus: int


def plan_slot(nodes: Sequence[Node], *, device: str, workers: int, cpus: int, gpus: int) -> Slot:
    """Return what an actor gets.

    GPUs, where the device is one or `auto` finds one on a node; else CPUs: those asked for, an
    even share if the number of actors is given, or all of the smallest node.

    Args:
        nodes: of the cluster, now.
        device: as of ForwardSettings.
        workers: actors; 0: one a slot.
        cpus: asked for; 0: chosen here.
        gpus: asked for, where there are any.

    Raises:
        InputError: no node has as many CPUs.
    """
    offers = sorted(int(node.get("CPU", 0)) for node in nodes if node.get("CPU", 0) >= 1)
    if offers and cpus > offers[-1]:
        raise InputError(
            f"ray_cpus: expected at most the {offers[-1]} of the largest node, got {cpus}. "
            f"Fix: --ray-cpus {offers[-1]}"
        )
    has_gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
    if device.startswith("cuda") or (device == "auto" and has_gpus):
        return Slot(cpus=cpus or 1, gpus=gpus)
    if cpus or not offers:  # none yet: nodes may be started as actors ask for them
        return Slot(cpus=cpus or 1, gpus=0)
    share = max(1, sum(offers) // workers) if workers else offers[0]
    return Slot(cpus=min(share, offers[-1]), gpus=0)


def count_slots(nodes: Sequence[Node], slot: Slot) -> int:
    """Return how many actors the nodes have room for, if nothing else ran there."""
    rooms = []
    for node in nodes:
        room = int(node.get("CPU", 0)) // slot.cpus
        rooms.append(min(room, int(node.get("GPU", 0)) // slot.gpus) if slot.gpus else room)
    return sum(rooms)
