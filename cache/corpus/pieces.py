"""Tokens as text that people can check: which is prompt, target, special token or stop token.

The text is decoded from the token ids, so it shows what is stored and not what was meant.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTEXT = 8
"""Tokens before one that are decoded with it: some decoders join or trim blanks."""
_MOST_TOGETHER = 16
"""Most tokens that are waited for to complete a character."""
_INCOMPLETE = "\ufffd"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Text of consecutive tokens of one sort."""

    text: str
    is_target: bool
    is_special: bool
    """Whether it is one special token, under its own name."""
    is_stop: bool
    """Whether it is an end token that the model learns to write."""


def cut_pieces(
    tokenizer: "PreTrainedTokenizerBase",
    tokens: Sequence[int],
    loss_mask: Sequence[int],
    *,
    end_tokens: Collection[int] = (),
) -> list[Piece]:
    """Return the text of a sample, cut where the sort of its tokens changes. Pure.

    Args:
        tokenizer: of the base.
        tokens: [T] ids; one that the tokenizer does not know is shown by its number.
        loss_mask: [T] 1 where the token is a target.
        end_tokens: ids that end generation.
    """
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    special = {token for token, entry in added.items() if entry.special}
    special |= {*tokenizer.all_special_ids, *end_tokens}
    pieces: list[Piece] = []
    start = 0
    sorts = [
        (bool(target), index if token in special or token not in names else -1)
        for index, (token, target) in enumerate(zip(tokens, loss_mask, strict=True))
    ]
    for (is_target, special_at), group in groupby(sorts):
        stop = start + len(list(group))
        if special_at < 0:
            text = "".join(_iter_texts(tokenizer, tokens, start, stop))
        else:
            text = names.get(tokens[start], f"token {tokens[start]}")
        is_stop = special_at >= 0 and is_target and tokens[start] in end_tokens
        if text:
            pieces.append(
                Piece(text=text, is_target=is_target, is_special=special_at >= 0, is_stop=is_stop)
            )
        start = stop
    return pieces


def _iter_texts(
    tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int], start: int, stop: int
) -> Iterator[str]:
    """Yield the text that each token adds, or those that are one character together."""
    first = start
    begins = [0, start]  # of the last texts: no context begins within a character
    for end in range(start + 1, stop + 1):
        before = begins[0]
        context = _decode(tokenizer, tokens[before:first])
        text = _decode(tokenizer, tokens[before:end])
        text = text[_num_shared(text, context) :]
        is_last = end == stop or end - first == _MOST_TOGETHER
        if not text.endswith(_INCOMPLETE) or is_last:
            yield text
            first = end
            begins = [*begins[-_CONTEXT:], end]


def _decode(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int]) -> str:
    known = [int(token) for token in tokens if 0 <= token < len(tokenizer)]
    text = tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _num_shared(first: str, second: str) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
