"""Trie of the bytes of a vocabulary, and the walk of two tries side by side.

Letters: N byte strings, E edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
ROOT = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ByteTrie:
    """Edges of a trie, where each of its strings ends, and which are below each node."""

    keys: Ints
    """[E] sorted: 256 times the node of an edge, plus its byte. Edge e leads to node e + 1."""
    edges: Ints
    """[nodes + 1] first edge of each node."""
    ends: Ints
    """[N] node at the end of each string; -1 for an empty one."""
    is_end: NDArray[np.bool_]
    """[nodes] whether a string ends there."""
    order: Ints
    """Strings that are not empty, sorted by their bytes, equal ones by their numbers."""
    first: Ints
    """[nodes] place in `order` of the first string that begins with a node's bytes."""
    stop: Ints
    """[nodes] place behind the last of them."""

    def step(self, nodes: Ints, data: NDArray[np.uint8]) -> Ints:
        """Return the nodes one byte further, -1 where there is none."""
        if not len(self.keys):
            return np.full(len(nodes), -1, dtype=np.int64)
        keys = nodes * 256 + data
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[at] == keys, at + 1, -1)

    def path(self, string: bytes) -> list[int]:
        """Return the nodes on the way of a byte string, as far as there are any, without the root.

        Args:
            string: that is followed from the root, byte by byte.
        """
        nodes: list[int] = []
        for byte in string:
            key = 256 * (nodes[-1] if nodes else ROOT) + byte
            edge = int(np.searchsorted(self.keys, key))
            if edge == len(self.keys) or self.keys[edge] != key:
                break
            nodes.append(edge + 1)
        return nodes

    def ends_at(self, node: int) -> Ints:
        """Return the strings that end at a node, ascending."""
        children = slice(self.edges[node] + 1, self.edges[node + 1] + 1)
        num_longer = (self.stop[children] - self.first[children]).sum()
        # the shortest of those that begin alike come first
        return self.order[self.first[node] : self.stop[node] - num_longer]


def build_trie(strings: Sequence[bytes | None]) -> ByteTrie:
    """Return the trie of byte strings, without those that are empty or None."""
    order = sorted(
        (number for number, string in enumerate(strings) if string),
        key=lambda number: strings[number] or b"",
    )
    data = np.frombuffer(b"".join(strings[number] or b"" for number in order), dtype=np.uint8)
    lengths = np.array([len(strings[number] or b"") for number in order], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    empty = np.zeros(0, dtype=np.int64)
    keys, first, stop = [empty], [empty], [empty]
    ends = np.full(len(order), -1, dtype=np.int64)
    active = np.arange(len(order), dtype=np.int64)
    nodes = np.full(len(active), ROOT, dtype=np.int64)
    depth, num_nodes = 0, 1
    while len(active):
        edges = nodes * 256 + data[starts[active] + depth]
        unique, at, places, counts = np.unique(
            edges, return_index=True, return_inverse=True, return_counts=True
        )
        keys.append(unique)
        first.append(active[at])
        stop.append(active[at] + counts)  # sorted, so that those below a node are side by side
        nodes = num_nodes + places.astype(np.int64)
        num_nodes += len(unique)
        depth += 1
        is_done = lengths[active] == depth
        ends[active[is_done]] = nodes[is_done]
        active, nodes = active[~is_done], nodes[~is_done]
    # a node of a deeper level has a higher number, so the levels are in order
    all_keys = np.concatenate(keys)
    is_end = np.zeros(num_nodes, dtype=np.bool_)
    is_end[ends] = True
    ends_by_string = np.full(len(strings), -1, dtype=np.int64)
    ends_by_string[order] = ends
    return ByteTrie(
        keys=all_keys,
        edges=np.searchsorted(all_keys, np.arange(num_nodes + 1, dtype=np.int64) * 256),
        ends=ends_by_string,
        is_end=is_end,
        order=np.array(order, dtype=np.int64),
        first=np.concatenate([[0], *first]),
        stop=np.concatenate([[len(order)], *stop]),
    )


def walk_both(
    one: ByteTrie,
    other: ByteTrie,
    *,
    start: tuple[int, int],
    is_followed: NDArray[np.bool_] | None = None,
) -> tuple[Ints, Ints]:
    """Follow all ways of one trie in another; return the nodes of both, less deep ones first.

    The first pair is `start`. Where the other trie has no such way its node is -1, and nothing
    behind it is followed.

    Args:
        one: whose ways are followed.
        other: from its own node.
        start: node of each.
        is_followed: [256] bytes that are followed; None: all.
    """
    nodes = np.array([start[0]], dtype=np.int64)
    others = np.array([start[1]], dtype=np.int64)
    found, other_found = [nodes], [others]
    while len(nodes):
        edges = ranges(one.edges[nodes], one.edges[nodes + 1])
        others = np.repeat(others, one.edges[nodes + 1] - one.edges[nodes])
        data = one.keys[edges] & 255
        if is_followed is not None:
            kept = is_followed[data]
            edges, others, data = edges[kept], others[kept], data[kept]
        nodes, others = edges + 1, other.step(others, data.astype(np.uint8))
        found.append(nodes)
        other_found.append(others)
        is_on = others >= 0
        nodes, others = nodes[is_on], others[is_on]
    return np.concatenate(found), np.concatenate(other_found)


def ranges(first: Ints, stop: Ints) -> Ints:
    """Return the numbers of several ranges behind each other."""
    counts = stop - first
    before = np.cumsum(counts) - counts
    return np.repeat(first - before, counts) + np.arange(counts.sum(), dtype=np.int64)
