"""Bytes that each token of a vocabulary stands for.

Known for byte-level BPE, and for SentencePiece's vocabularies as `tokenizers` writes them: blanks
as U+2581, and tokens such as `<0x0A>` for single bytes.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from carryon.cache.corpus.tokenize import get_backend
from carryon.cache.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TokenBytes = tuple[bytes | None, ...]
"""Bytes of each token of a vocabulary, by id. None: the token stands for no text."""
_BLANK = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(
    tokenizer: "PreTrainedTokenizerBase", *, vocab_size: int | None = None
) -> TokenBytes:
    """Return the bytes of each token of a tokenizer.

    Special tokens and ids without a token stand for no text. Added tokens that are not special,
    such as the runs of line breaks of Gemma, are found in texts like all others, so they stand
    for theirs.

    Args:
        tokenizer: of a base.
        vocab_size: rows of the base's head, which may be more or fewer than the tokens. None: as
            the tokenizer has them.

    Raises:
        InputError: no fast tokenizer, or one whose tokens are not bytes of a text, such as
            WordPiece's.
    """
    rules: dict[str, Any] = json.loads(get_backend(tokenizer).to_str())
    spell = _spelling(rules, name=tokenizer.name_or_path)
    vocabulary: Mapping[str, int] = _vocabulary(rules["model"])
    found = {number: spell(name) for name, number in vocabulary.items()}
    for added in rules.get("added_tokens") or ():
        content: str = added["content"]
        is_blank_mark = spell.blank is not None
        text = content.replace(_BLANK, " ") if is_blank_mark else content
        found[added["id"]] = None if added["special"] else text.encode()
    size = max(found, default=-1) + 1 if vocab_size is None else vocab_size
    return tuple(found.get(number) or None for number in range(size))


def digest_bytes(tokens: Sequence[bytes | None]) -> str:
    """Return the SHA-256 (hex) of a vocabulary's bytes."""
    digest = hashlib.sha256()
    for token in tokens:
        # the length before the bytes: ab, c is not a, bc
        digest.update((-1 if token is None else len(token)).to_bytes(8, "little", signed=True))
        digest.update(token or b"")
    return digest.hexdigest()


class _Spelling:
    """The rule from the name of a token to its bytes."""

    def __init__(self, *, letters: Mapping[str, int] | None, has_bytes: bool) -> None:
        """Keep the letters of byte-level names, or None where names are text."""
        self.letters = letters
        self.blank = _BLANK if letters is None else None
        self.has_bytes = has_bytes

    def __call__(self, name: str) -> bytes | None:
        """Return the bytes of a token; None where a byte-level name has other letters."""
        if self.letters is not None:
            letters = self.letters
            if not all(letter in letters for letter in name):
                return None
            return bytes(letters[letter] for letter in name)
        if self.has_bytes and (match := _BYTE.fullmatch(name)):
            return bytes([int(match[1], 16)])
        return name.replace(_BLANK, " ").encode()


def _spelling(rules: Mapping[str, Any], *, name: str) -> _Spelling:
    model = rules["model"]
    kind = model.get("type")
    steps = list(_steps(rules.get("pre_tokenizer"))) + list(_steps(rules.get("decoder")))
    types = {step.get("type") for step in steps}
    replaces_blank = any(
        step.get("type") == "Replace"
        and step.get("pattern") == {"String": _BLANK}
        and step.get("content") == " "
        for step in steps
    )
    if kind in ("BPE", "Unigram") and not (
        model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    ):
        if "ByteLevel" in types:
            return _Spelling(letters=_letters(), has_bytes=False)
        if "Metaspace" in types or replaces_blank:
            return _Spelling(letters=None, has_bytes=bool(model.get("byte_fallback")))
    decoders = sorted(filter(None, types)) or ["no decoder"]
    raise InputError(
        f"tokenizer {name!r}: expected byte-level BPE or SentencePiece, whose tokens are bytes of "
        f"a text, got {kind} with {', '.join(decoders)}. Fix: choose another base to mix"
    )


def _letters() -> Mapping[str, int]:
    """Return the byte of each letter of byte-level names, as GPT-2 chose them.

    Bytes that print as they are in Latin-1 keep their letter; the others are numbered from 256.
    """
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }


def _vocabulary(model: Mapping[str, Any]) -> Mapping[str, int]:
    """Return the ids of a model by name; Unigram lists names with their scores."""
    entries = model["vocab"]
    if isinstance(entries, Mapping):
        return entries
    return {entry[0]: number for number, entry in enumerate(entries)}


def _steps(rules: Any) -> Iterator[Mapping[str, Any]]:  # noqa: ANN401 -- JSON of any tokenizer
    if isinstance(rules, Mapping):
        yield rules
        for key in ("pretokenizers", "decoders"):
            for step in rules.get(key) or ():
                yield from _steps(step)
