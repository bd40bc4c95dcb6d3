"""Trie of the bytes of a vocabulary, walked by many byte strings at once.

Letters: N byte strings, E edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
ROOT = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ByteStrings:
    """Byte strings behind each other."""

    data: NDArray[np.uint8]
    """Bytes of all."""
    starts: Ints
    """[N] first byte of each."""
    lengths: Ints
    """[N]."""

    @classmethod
    def of(cls, strings: Sequence[bytes | None]) -> "ByteStrings":
        """Return byte strings; None is an empty one."""
        lengths = np.array([len(string or b"") for string in strings], dtype=np.int64)
        data = np.frombuffer(b"".join(string or b"" for string in strings), dtype=np.uint8)
        return cls(data=data, starts=np.cumsum(lengths) - lengths, lengths=lengths)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ByteTrie:
    """Edges of a trie, and where each of its strings ends."""

    keys: Ints
    """[E] sorted: 256 times the node of an edge, plus its byte."""
    children: Ints
    """[E] node at the end of each edge."""
    ends: Ints
    """[N] node at the end of each string; -1 for an empty one."""
    is_end: NDArray[np.bool_]
    """[nodes] whether a string ends there."""

    def step(self, nodes: Ints, data: NDArray[np.uint8]) -> Ints:
        """Return the nodes one byte further, -1 where there is none."""
        keys = nodes * 256 + data
        at = np.searchsorted(self.keys, keys)
        at[at == len(self.keys)] = 0
        if not len(self.keys):
            return np.full(len(nodes), -1, dtype=np.int64)
        return np.where(self.keys[at] == keys, self.children[at], -1)

    def find(self, string: bytes) -> int:
        """Return the node of a byte string, -1 if there is none."""
        node = np.array([ROOT], dtype=np.int64)
        for byte in string:
            node = self.step(node, np.array([byte], dtype=np.uint8))
            if node[0] < 0:
                return -1
        return int(node[0])

    def longest(self, strings: ByteStrings, *, start: int) -> Ints:
        """Return the last node below `start` on the way of each string where one of ours ends.

        Args:
            strings: that are followed from `start`, byte by byte.
            start: a node.

        Returns:
            [N] nodes, -1 where there is none.
        """
        found = np.full(len(strings.lengths), -1, dtype=np.int64)
        active = np.flatnonzero(strings.lengths > 0)
        nodes = np.full(len(active), start, dtype=np.int64)
        depth = 0
        while len(active):
            nodes = self.step(nodes, strings.data[strings.starts[active] + depth])
            is_on = nodes >= 0
            active, nodes = active[is_on], nodes[is_on]
            ends = self.is_end[nodes]
            found[active[ends]] = nodes[ends]
            depth += 1
            goes_on = strings.lengths[active] > depth
            active, nodes = active[goes_on], nodes[goes_on]
        return found


def build_trie(strings: ByteStrings) -> ByteTrie:
    """Return the trie of byte strings, empty ones left out."""
    keys, children = [], []
    ends = np.full(len(strings.lengths), -1, dtype=np.int64)
    active = np.flatnonzero(strings.lengths > 0)
    nodes = np.full(len(active), ROOT, dtype=np.int64)
    depth, num_nodes = 0, 1
    while len(active):
        edges = nodes * 256 + strings.data[strings.starts[active] + depth]
        unique, places = np.unique(edges, return_inverse=True)
        keys.append(unique)
        children.append(np.arange(num_nodes, num_nodes + len(unique), dtype=np.int64))
        nodes = num_nodes + places.astype(np.int64)
        num_nodes += len(unique)
        depth += 1
        is_done = strings.lengths[active] == depth
        ends[active[is_done]] = nodes[is_done]
        active, nodes = active[~is_done], nodes[~is_done]
    empty = np.zeros(0, dtype=np.int64)
    # a node of a deeper level has a higher number, so the levels are in order
    is_end = np.zeros(num_nodes, dtype=np.bool_)
    is_end[ends[ends >= 0]] = True
    return ByteTrie(
        keys=np.concatenate([*keys, empty]),
        children=np.concatenate([*children, empty]),
        ends=ends,
        is_end=is_end,
    )
