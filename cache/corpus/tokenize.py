"""Texts as tokens, each with its end in the text and its loss mask.

A rendered conversation is tokenized without special tokens. Prompt and completion are tokenized
separately, as generation does it, after the tokenizer's own start tokens and before an
end-of-text token, which is a target; likewise a text. Start tokens are never targets; any other
token is one if it overlaps a target character.

Letters: T tokens of a record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from carryon.cache.corpus.chat_template import Rendering
from carryon.cache.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """A tokenizer that adds no special tokens, and those that the original adds."""

    backend: "Tokenizer"
    start: list[int]
    """The tokens before a text, such as a begin-of-text token."""
    end: int | None
    """The end-of-text token, None where the tokenizer has none."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenRows:
    """All tokens of one record."""

    tokens: NDArray[np.int32]
    """[T] int32."""
    loss_mask: NDArray[np.uint8]
    """[T] uint8: 1 where the token is a training target."""
    char_end: NDArray[np.int32]
    """[T] int32: as in `Sample`, over the record's parts joined; start tokens end at 0, the
    end-of-text token at the end of the text."""


def make_encoder(tokenizer: "PreTrainedTokenizerBase") -> Encoder:
    """Return the encoder of a tokenizer, which is not changed.

    Raises:
        InputError: not a fast tokenizer, so it gives no offsets of tokens in the text.
    """
    original = getattr(tokenizer, "backend_tokenizer", None)
    if original is None:
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r}: expected a fast tokenizer, which gives the "
            f"offset of each token in the text, got {type(tokenizer).__name__}"
        )
    # A copy, 0.1 s at V = 49,152: without the post-processor, which may trim blanks off the
    # offsets (GPT-NeoX's does), and without truncation and padding, which may be switched on
    backend: Tokenizer = type(original).from_str(original.to_str())
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    # The tokens that the original puts before any text, read off a text of one letter
    letter = tokenizer("a", return_special_tokens_mask=True)
    num_start = [*letter["special_tokens_mask"], 0].index(0)
    start = list(letter["input_ids"][:num_start])
    return Encoder(backend=backend, start=start, end=tokenizer.eos_token_id)


def encode(encoder: Encoder, renderings: Sequence[Rendering]) -> list[TokenRows]:
    """Return the tokens of each rendering; one threaded call for all of them.

    Raises:
        InputError: a text needs the end-of-text token, and the tokenizer has none.
    """
    if encoder.end is None and any(rendering.is_framed for rendering in renderings):
        raise InputError(
            "the tokenizer has no end-of-text token, with which prompt + completion and text "
            "records end: set its eos_token, or give messages"
        )
    texts = [part.text for rendering in renderings for part in rendering.parts]
    encodings = iter(encoder.backend.encode_batch(texts, add_special_tokens=False))
    return [
        _join(rendering, [next(encodings) for _ in rendering.parts], encoder)
        for rendering in renderings
    ]


def _join(rendering: Rendering, encodings: Sequence["Encoding"], encoder: Encoder) -> TokenRows:
    start = encoder.start if rendering.is_framed else []
    end = [encoder.end] if rendering.is_framed else []
    tokens = list(start)
    loss_mask: list[NDArray[Any]] = [np.zeros(len(start))]
    char_end: list[NDArray[Any]] = [np.zeros(len(start))]
    num_chars = 0
    for part, encoding in zip(rendering.parts, encodings, strict=True):
        tokens += encoding.ids
        offsets = np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)
        loss_mask.append(_mark(offsets, part.targets))
        char_end.append(num_chars + offsets[:, 1])
        num_chars += len(part.text)
    return TokenRows(
        tokens=np.array([*tokens, *end], dtype=np.int32),
        loss_mask=np.concatenate([*loss_mask, np.ones(len(end))]).astype(np.uint8),
        # never decreases, even where a normalizer has reordered characters
        char_end=np.maximum.accumulate(
            np.concatenate([*char_end, np.full(len(end), num_chars)]).astype(np.int32)
        ),
    )


def _mark(
    offsets: NDArray[np.int32], targets: Sequence[tuple[int, int]] | None
) -> NDArray[np.bool_]:
    """Return, [T] bool for offsets [T, 2], which tokens overlap one of the target characters."""
    if targets is None:
        return np.ones(len(offsets), dtype=np.bool_)
    # a token of no width, such as a blank that a normalizer adds, goes with the one before it
    first, end = np.minimum(offsets[:, 0], offsets[:, 1] - 1), offsets[:, 1]
    is_target = np.zeros(len(offsets), dtype=np.bool_)
    for start, stop in targets:
        is_target |= (first < stop) & (end > start)
    return is_target
