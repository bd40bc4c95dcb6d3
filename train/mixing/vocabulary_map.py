"""Map from the tokens of one vocabulary to those of another, by their bytes.

The rule. Let c be bytes that lie behind a state of the source and that the anchor has written
already; often none. A token b of the source that begins with c and is longer says that the text
continues with r, the bytes of b behind c, and not with more bytes of a longer token of the source:
that one would have been written instead. So

1. b stands for the tokens a of the anchor for which b is the longest token of the source that
   begins c + a (and is longer than c). Its mass is split among them in proportion to the anchor's
   own probabilities.
2. If there are none, since the anchor needs several tokens for r, its mass goes to the first of
   them: the longest token of the anchor that begins r.
3. If there is none either, or b stands for no text, the anchor's own distribution gets its mass.

A token that crosses the end of what is written says nothing if the anchor contradicts it: where the
anchor's last token l and r are letters up to the next byte that is none, and l with those letters
is one token of the anchor, that one would have been written in the place of l.

Tokens of equal bytes share their mass in proportion to the anchor's own probabilities. The stop
tokens of the source stand together for those of the anchor. A token of the source that does not
begin with c, or ends with it, says nothing about what follows.

Every mass is given once, so a distribution stays one. With equal vocabularies each token stands
for itself. Letters: V_A tokens of the anchor, V_B of the source.
"""

import hashlib
import string
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.vocabulary.token_bytes import digest_bytes
from carryon.cache.errors import InputError
from carryon.train.mixing.byte_trie import ROOT, ByteTrie, Ints, build_trie, ranges, walk_both

RULE_VERSION = 2
"""Of the rule above and of the projection; part of every digest."""
_IS_LETTER: NDArray[np.bool_] = np.isin(
    np.arange(256), np.frombuffer(string.ascii_letters.encode(), dtype=np.uint8)
)
_MAX_KEPT = 2048
"""Spreads that are kept, most of them of a few hundred bytes: the last word of a text again and
again."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Spread:
    """Where the mass of some tokens of the source goes: groups of tokens of the anchor."""

    sources: Ints
    """[m] tokens of the source."""
    places: Ints
    """[m] group of each; `num_groups`: the anchor's own distribution."""
    members: Ints
    """[k] tokens of the anchor; a token is in at most two groups."""
    groups: Ints
    """[k] group of each."""
    num_groups: int
    """Groups, each with a member at least."""


class VocabularyMap:
    """The map of a pair of vocabularies, made for covered bytes as they are asked for."""

    def __init__(
        self,
        *,
        source: Sequence[bytes | None],
        anchor: Sequence[bytes | None],
        source_stops: Sequence[int],
        anchor_stops: Sequence[int],
    ) -> None:
        """Read two vocabularies; what stop tokens spell is not looked at.

        Args:
            source: bytes of each token of the source, one for each row of its head.
            anchor: bytes of each token of the anchor, one for each row of its head.
            source_stops: tokens with which the source ends a turn.
            anchor_stops: tokens with which the anchor ends a turn.

        Raises:
            InputError: a stop token outside a vocabulary, or a vocabulary without text.
        """
        self.source = _without(source, source_stops, "source")
        self.anchor = _without(anchor, anchor_stops, "anchor")
        self.source_stops = tuple(sorted(set(source_stops)))
        self.anchor_stops = tuple(sorted(set(anchor_stops)))
        self._tries = build_trie(self.source), build_trie(self.anchor)
        self._anchors_by_node = _by_node(self._tries[1])
        self._kept: OrderedDict[bytes, Spread] = OrderedDict()
        self.whole = self._spread_whole()
        """The spread of all tokens of the source, where nothing is covered."""

    def digest(self) -> str:
        """Return the SHA-256 (hex) of both vocabularies, the stop tokens and the rule."""
        parts = [
            str(RULE_VERSION),
            digest_bytes(self.source),
            digest_bytes(self.anchor),
            str(self.source_stops),
            str(self.anchor_stops),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def spread(self, covered: bytes) -> Spread:
        """Return where the tokens go that begin with bytes, not none, and are longer."""
        if covered in self._kept:
            self._kept.move_to_end(covered)
            return self._kept[covered]
        spread = self._spread(self._node(covered))
        self._kept[covered] = spread
        if len(self._kept) > _MAX_KEPT:
            self._kept.popitem(last=False)
        return spread

    def contradicted(self, covered: bytes, anchor_token: int) -> NDArray[np.bool_]:
        """Return which tokens of `spread(covered)` the anchor's last token contradicts, [m].

        Only letters of ASCII that follow a letter are looked at: elsewhere the anchor's tokenizer
        may have cut the text into words before it looked for tokens.

        Args:
            covered: as in `spread`.
            anchor_token: the anchor's token that ends with the covered bytes.
        """
        trie, anchor_trie = self._tries
        start, end = self._node(covered), int(anchor_trie.ends[anchor_token])
        if start < 0:
            return np.zeros(0, dtype=np.bool_)
        first, stop = trie.first[start], trie.stop[start]
        is_out = np.zeros(stop - first, dtype=np.bool_)
        if (self.anchor[anchor_token] or b"")[-1:].isalpha():
            nodes, ends = walk_both(trie, anchor_trie, start=(start, end), is_followed=_IS_LETTER)
            # a node counts for the tokens below it that have no further letter
            nodes, ends = nodes[1:], ends[1:]
            is_one = (ends >= 0) & anchor_trie.is_end[ends]
            _paint_(is_out, trie.first[nodes] - first, trie.stop[nodes] - first, is_one)
        return is_out[len(trie.ends_at(start)) :]

    def first_token(self, covered: bytes) -> int:
        """Return the longest token of the source that begins bytes; the lowest of equal ones.

        Raises:
            InputError: there is none.
        """
        trie = self._tries[0]
        ends = [node for node in trie.path(covered) if trie.is_end[node]]
        if not ends:
            raise InputError(f"expected bytes that the source can write, got {covered!r}")
        return int(trie.ends_at(ends[-1])[0])

    def _node(self, covered: bytes) -> int:
        """Return the node of bytes, not none, in the source's trie, -1 if there is none."""
        path = self._tries[0].path(covered)
        return path[-1] if len(path) == len(covered) else -1

    def _spread_whole(self) -> Spread:
        """Return the spread of all tokens, [V_B] in order, with the stop tokens' group behind."""
        spread = self._spread(ROOT)
        has_stops = bool(self.source_stops and self.anchor_stops)
        num_groups = spread.num_groups + has_stops
        places = np.full(len(self.source), num_groups, dtype=np.int64)
        known = spread.places < spread.num_groups
        places[spread.sources[known]] = spread.places[known]
        members, groups = spread.members, spread.groups
        if has_stops:
            places[list(self.source_stops)] = spread.num_groups
            members = np.append(members, self.anchor_stops)
            groups = np.append(groups, [spread.num_groups] * len(self.anchor_stops))
        return Spread(
            sources=np.arange(len(self.source), dtype=np.int64),
            places=places,
            members=members,
            groups=groups,
            num_groups=num_groups,
        )

    def _spread(self, start: int) -> Spread:
        """Return where the tokens below a node of the source go; -1: of none."""
        trie, anchor_trie = self._tries
        if start < 0 or trie.stop[start] - trie.first[start] == len(trie.ends_at(start)):
            none = np.zeros(0, dtype=np.int64)
            return Spread(sources=none, places=none, members=none, groups=none, num_groups=0)
        first, stop = trie.first[start] + len(trie.ends_at(start)), trie.stop[start]
        sources = trie.order[first:stop]
        nodes, anchor_nodes = walk_both(trie, anchor_trie, start=(start, ROOT))
        is_in_both = anchor_nodes > ROOT
        nodes, anchor_nodes = nodes[is_in_both], anchor_nodes[is_in_both]
        # 1. tokens of the anchor by the longest token of the source that begins them
        best = np.full(len(anchor_trie.order), -1, dtype=np.int64)
        is_end = trie.is_end[nodes]
        at = anchor_nodes[is_end]
        _paint_(best, anchor_trie.first[at], anchor_trie.stop[at], nodes[is_end])
        has_best = np.flatnonzero(best >= 0)
        split, best = anchor_trie.order[has_best], best[has_best]
        by_number = np.argsort(split)
        split, best = split[by_number], best[by_number]
        split_nodes = np.unique(best)
        ends = trie.ends[sources]
        has_split = np.isin(ends, split_nodes)
        # 2. the first piece of the others
        pieces = np.full(len(sources), -1, dtype=np.int64)
        is_end = anchor_trie.is_end[anchor_nodes]
        at = nodes[is_end]
        _paint_(pieces, trie.first[at] - first, trie.stop[at] - first, anchor_nodes[is_end])
        others = pieces[~has_split]
        piece_nodes = np.unique(others[others >= 0])
        num_groups = len(split_nodes) + len(piece_nodes)
        places = np.full(len(sources), num_groups, dtype=np.int64)
        places[has_split] = np.searchsorted(split_nodes, ends[has_split])
        numbers = len(split_nodes) + np.searchsorted(piece_nodes, others)
        places[~has_split] = np.where(others >= 0, numbers, num_groups)
        members, groups = self._members(piece_nodes)
        return Spread(
            sources=sources,
            places=places,
            members=np.concatenate([split, members]),
            groups=np.concatenate([np.searchsorted(split_nodes, best), groups + len(split_nodes)]),
            num_groups=num_groups,
        )

    def _members(self, nodes: Ints) -> tuple[Ints, Ints]:
        """Return the tokens of the anchor at nodes of its trie, and which node each is at."""
        tokens, sorted_nodes = self._anchors_by_node
        first = np.searchsorted(sorted_nodes, nodes, side="left")
        stop = np.searchsorted(sorted_nodes, nodes, side="right")
        groups = np.repeat(np.arange(len(nodes), dtype=np.int64), stop - first)
        return tokens[ranges(first, stop)], groups


def _by_node(trie: ByteTrie) -> tuple[Ints, Ints]:
    """Return the tokens that end in a trie, by node, and their nodes."""
    tokens = np.flatnonzero(trie.ends >= 0)
    order = np.argsort(trie.ends[tokens], kind="stable")
    return tokens[order], trie.ends[tokens[order]]


def _paint_(values: NDArray[Any], first: Ints, stop: Ints, new: NDArray[Any]) -> None:
    """Give ranges of values new ones; where they overlap, later ones stay."""
    values[ranges(first, stop)] = np.repeat(new, stop - first)


def _without(
    tokens: Sequence[bytes | None], stops: Sequence[int], name: str
) -> tuple[bytes | None, ...]:
    """Return a vocabulary whose stop tokens, and empty tokens, stand for no text."""
    outside = [number for number in stops if not 0 <= number < len(tokens)]
    if outside:
        raise InputError(
            f"stop tokens of the {name}: expected ids below {len(tokens):,}, got {outside[0]}"
        )
    kept = tuple(
        (token or None) if number not in set(stops) else None for number, token in enumerate(tokens)
    )
    if not any(kept):
        raise InputError(f"vocabulary of the {name}: expected tokens with bytes, got none")
    return kept
