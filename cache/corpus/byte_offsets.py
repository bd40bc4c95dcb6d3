"""Places of byte-level tokens in a text, from the bytes of each token.

The tokenizer's own offsets come as a Python tuple for each token, which takes a third of the time
of tokenizing. Where each token stands for known bytes, the offsets are sums of their numbers.
"""

import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import AddedToken

_KEEPING = {"Split", "Digits", "ByteLevel"}
"""Pre-tokenizers that leave out no character."""


def count_bytes(
    rules: Mapping[str, Any], added: "Mapping[int, AddedToken]"
) -> NDArray[np.int32] | None:
    """Return the bytes of each token, [V] int32; None where tokens are not pieces of the text.

    Args:
        rules: JSON of the tokenizer.
        added: its added tokens by id.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    model, steps = rules["model"], rules.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    is_plain = (
        model.get("type") == "BPE"
        and not model.get("byte_fallback")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and all(step.get("type") in _KEEPING for step in steps)
        and all(step.get("behavior") != "Removed" for step in steps)
        and not any(step.get("add_prefix_space") for step in steps)
        and any(step.get("type") == "ByteLevel" for step in steps)
        and (rules.get("normalizer") or {}).get("type", "NFC") == "NFC"
        and not any(token.lstrip or token.rstrip for token in added.values())
    )
    if not is_plain:
        return None
    alphabet = set(ByteLevel.alphabet())
    sizes = {
        token: len(name) for name, token in model["vocab"].items() if alphabet.issuperset(name)
    } | {token: len(entry.content.encode()) for token, entry in added.items()}
    counts = np.zeros(max(sizes) + 1, dtype=np.int32)
    counts[list(sizes)] = list(sizes.values())
    return counts


def find_places(
    text: str, ids: NDArray[np.int32], counts: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """Return first character and end of each token, [T] int32 each; None if they do not add up.

    A token that is only some bytes of a character has the place of the character.

    Args:
        text: that was tokenized.
        ids: [T] its tokens.
        counts: of `count_bytes`.
    """
    if len(ids) and int(ids.max()) >= len(counts):
        return None
    ends = np.cumsum(counts[ids], dtype=np.int32)
    starts = ends - counts[ids]
    num_bytes = int(ends[-1]) if len(ends) else 0
    if text.isascii():
        return (starts, ends) if num_bytes == len(text) else None
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    if num_bytes != len(data) or not unicodedata.is_normalized("NFC", text):
        return None
    # [bytes] number of characters that begin up to each byte: no first byte is 10xxxxxx
    begun = np.cumsum((data & 0xC0) != 0x80, dtype=np.int32)
    return begun[starts] - np.int32(1), begun[ends - 1]
