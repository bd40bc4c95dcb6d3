"""Questions that a model may have learned: those that stand in the store it was trained from."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from carryon.cache.base.identity import digest_tokenizer
from carryon.cache.errors import SettingMismatchError
from carryon.cache.store.reader import Store
from carryon.cache.store.samples import Unit
from carryon.train.data.split import split_of
from carryon.train.inference.scoring.problems import Problem
from carryon.train.modules.card import CarryOnCard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EDGE = "\x00"
"""Between samples, at special tokens, and where targets begin or end."""
_BEFORE, _BEHIND = f"{_EDGE}\n]>:", f"{_EDGE}\n[<"
"""Characters next to a whole question: also of templates without special tokens."""


def find_known(
    problems: Sequence[Problem],
    store: Store,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    card: CarryOnCard | None = None,
) -> list[Problem]:
    """Return the problems whose question stands in the training half of a store.

    Case and runs of space are not compared. A question counts where it is a whole turn, or whole
    lines.

    Args:
        problems: to look for.
        store: whose samples are read; their hidden states are not.
        tokenizer: of the store's base.
        card: of a carry-on, which tells the samples that it was trained on. None: all samples that
            the store does not mark as held out.

    Raises:
        SettingMismatchError: the store is of another tokenizer.
    """
    if digest_tokenizer(tokenizer) != store.base.get("tokenizer_sha256"):
        raise SettingMismatchError(
            f"{store.name}: expected a store of this base, got one of another tokenizer. "
            "Fix: another --store"
        )
    is_trained = _trained(store, card)
    waiting = {_folded(problem.question) for problem in problems} - {""}
    known: set[str] = set()
    for unit in store.iter_units(taps=[]):
        text = _folded(_EDGE.join(_pieces(unit, tokenizer, is_trained)))
        known |= {question for question in waiting if _stands_in(question, text)}
        waiting -= known
    return [problem for problem in problems if _folded(problem.question) in known]


def _trained(store: Store, card: CarryOnCard | None) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    is_trained = store.sample_held_out == 0
    if card is not None and card.is_trained_on(store.fingerprint, store.samples_digest):
        split = split_of(store, share=card.split["held_out_ratio"], seed=card.split["seed"])
        is_trained = np.ones(store.num_samples, dtype=np.bool_)
        is_trained[split.held_out] = False
    return is_trained  # type: ignore[no-any-return]


def _pieces(
    unit: Unit,
    tokenizer: "PreTrainedTokenizerBase",
    is_trained: np.ndarray[tuple[int], np.dtype[np.bool_]],
) -> Iterator[str]:
    """Yield the texts of a unit's training samples, cut at special tokens and edges of targets."""
    special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int64)
    for index, start, length in zip(unit.samples, unit.starts, unit.lengths, strict=True):
        if not is_trained[index]:
            continue
        tokens = unit.tokens[start : start + length]
        is_special, mask = np.isin(tokens, special), unit.loss_mask[start : start + length]
        edges = np.flatnonzero((np.diff(mask) != 0) | is_special[1:] | is_special[:-1]) + 1
        pieces = np.split(np.arange(length), edges)
        kept = [tokens[piece].tolist() for piece in pieces if not is_special[piece].all()]
        yield from tokenizer.batch_decode(kept)


def _stands_in(question: str, text: str) -> bool:
    at = text.find(question)
    while at >= 0:
        before = text[max(at - 8, 0) : at].rstrip(" ")[-1:]
        end = at + len(question)
        behind = text[end : end + 8].lstrip(" ")[:1]
        if (not before or before in _BEFORE) and (not behind or behind in _BEHIND):
            return True
        at = text.find(question, at + 1)
    return False


def _folded(text: str) -> str:
    text = re.sub(r"\s*\n\s*", "\n", text.casefold())
    return re.sub(r"[^\S\n]+", " ", text).strip()
