"""One sample as a tree of another base's tokens, and the tree's nodes that each anchor token sees.

The trunk is the tokenization of the whole text; a beginning that is tokenized in another way
branches off it. The path from the first node to any node is the tokenization of one beginning, so
the state at a node knows nothing of what follows. Letters: n nodes, T anchor tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from carryon.cache.alignment.prefixes import Prefixes, PrefixTokenizer, join


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenTree:
    """Tokens of a base over all beginnings of a text that an anchor has."""

    tokens: NDArray[np.int32]
    """[n] token ids, the trunk first."""
    parents: NDArray[np.int32]
    """[n] the node before each, -1 for none; always a lower number."""
    exact: NDArray[np.int32]
    """[T] last node of the tokenization of what is known at the end of each anchor token; -1 where
    the base has no token yet."""
    stable: NDArray[np.int32]
    """[T] the last node on its path that no later text can change; -1 for none."""
    covered: NDArray[np.int32]
    """[T] bytes that are known behind the end of the stable node."""
    is_whole: NDArray[np.uint8]
    """[T] 1 where the exact node ends with the last known byte, 0 where a character is begun."""


def grow_tree(
    text: str,
    cuts: Sequence[int],
    ends: NDArray[np.int64],
    partial: NDArray[np.int32],
    *,
    start: NDArray[np.int32],
    tokenizer: PrefixTokenizer,
) -> TokenTree:
    """Return the tree of a text.

    Args:
        text: as the base reads it; nothing behind the last end decides anything.
        cuts: characters that no token reaches over.
        ends: [T] characters of `text` that are known at each anchor token.
        partial: [T] bytes that are known of the character behind them.
        start: tokens that the base puts before the text.
        tokenizer: of the base.

    Raises:
        NotStableError: the tokenizer cannot be aligned.
    """
    last = int(ends.max(initial=0))
    inner = sorted({cut for cut in cuts if 0 < cut < last})
    wanted, is_cut = np.unique(ends), set(cuts)
    trunk, num_tokens = [start], len(start)
    found = [_ended(num_tokens, 0)]
    for low, high in pairwise([0, *inner, last]):
        if low == high:
            continue
        span = slice(*np.searchsorted(wanted, [low + 1, high + 1]).tolist())
        own = (wanted[span] - low).tolist()
        prefixes = tokenizer.tokenize(text[low:high], [*own, high - low], is_next=low > 0)
        # generation begins at a cut: nothing that follows is joined to it
        kept = prefixes.part(len(prefixes.ends) - (high in is_cut))
        found.append(kept.shifted(num_tokens=num_tokens, num_chars=low))
        trunk.append(prefixes.tokens)
        num_tokens += len(prefixes.tokens)
        if high in is_cut:
            found.append(_ended(num_tokens, high))
    return _place(text, np.concatenate(trunk), join(found), ends, partial)


def _ended(num_tokens: int, end: int) -> Prefixes:
    """Return a beginning that ends with its last token whatever follows."""
    one = np.array([num_tokens], dtype=np.int64)
    return Prefixes(
        tokens=np.empty(0, dtype=np.int32),
        ends=np.array([end], dtype=np.int64),
        num_shared=one,
        others={},
        num_stable=one,
        stable_end=np.array([end], dtype=np.int64),
    )


def _place(
    text: str,
    trunk: NDArray[np.int32],
    known: Prefixes,
    ends: NDArray[np.int64],
    partial: NDArray[np.int32],
) -> TokenTree:
    """Return the tree of a trunk with a branch for each beginning that leaves it."""
    tokens: list[int] = []
    parents: list[int] = []
    children: dict[tuple[int, int], int] = {}
    exact = known.num_shared - 1
    for index, others in sorted(known.others.items()):
        node = int(exact[index])
        for token in others:
            at = children.setdefault((node, token), len(trunk) + len(tokens))
            if at == len(trunk) + len(tokens):
                tokens.append(token)
                parents.append(node)
            node = at
        exact[index] = node
    num_bytes = _byte_ends(text)
    behind = num_bytes[known.ends] - num_bytes[known.stable_end]
    rows = np.searchsorted(known.ends, ends)
    return TokenTree(
        tokens=np.concatenate([trunk, np.array(tokens, dtype=np.int32)]),
        parents=np.concatenate([np.arange(-1, len(trunk) - 1), parents]).astype(np.int32),
        exact=exact[rows].astype(np.int32),
        stable=(known.num_stable - 1)[rows].astype(np.int32),
        covered=behind[rows].astype(np.int32) + partial,
        is_whole=(partial == 0).astype(np.uint8),
    )


def _byte_ends(text: str) -> NDArray[np.int64]:
    """Return, [characters + 1], the bytes of a text up to each character."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)])


def depths(parents: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the place of each node in its beginning, [n] from 0."""
    places: list[int] = []
    for parent in parents.tolist():
        places.append(places[parent] + 1 if parent >= 0 else 0)
    return np.array(places, dtype=np.int64)


def visible(parents: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return which nodes each node sees, [n, n]: itself and those before it on its path."""
    num_nodes = len(parents)
    is_trunk = parents == np.arange(-1, num_nodes - 1)
    num_trunk = num_nodes if is_trunk.all() else int(np.argmin(is_trunk))
    seen = np.zeros((num_nodes, num_nodes), dtype=np.bool_)
    seen[:num_trunk, :num_trunk] = np.tri(num_trunk, dtype=np.bool_)
    for node in range(num_trunk, num_nodes):
        if parents[node] >= 0:
            seen[node] = seen[parents[node]]
        seen[node, node] = True
    return seen


def needed_nodes(parents: NDArray[np.int32], nodes: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return which nodes lie on a path to some of `nodes`, [n]."""
    needed = np.zeros(len(parents), dtype=np.bool_)
    needed[nodes[nodes >= 0]] = True
    for node in np.flatnonzero(parents >= 0)[::-1].tolist():
        if needed[node]:
            needed[parents[node]] = True
    return needed


def split_tree(parents: NDArray[np.int32], *, max_nodes: int) -> list[NDArray[np.int64]]:
    """Return parts of a tree, each with all nodes on the paths to its nodes; together all of it.

    Args:
        parents: [n].
        max_nodes: of a part, at least those of the longest path.
    """
    parts: list[NDArray[np.int64]] = []
    before, part = parents.tolist(), set[int]()
    for node in range(len(before)):
        path = _missing(node, before, part)
        if part and len(part) + len(path) > max_nodes:
            parts.append(np.array(sorted(part), dtype=np.int64))
            part = set()
            path = _missing(node, before, part)
        part.update(path)
    return [*parts, np.array(sorted(part), dtype=np.int64)]


def _missing(node: int, parents: Sequence[int], part: set[int]) -> list[int]:
    """Return a node and those before it on its path, up to one of a part."""
    path = []
    while node >= 0 and node not in part:
        path.append(node)
        node = parents[node]
    return path
