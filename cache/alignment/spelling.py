"""Characters that a tokenizer does not write as they are: texts that differ in them look alike.

A vocabulary may lack a byte, which is then left out, or all characters that it does not know have
one token. So equal tokens alone do not prove that two texts are equal.
"""

import json
from dataclasses import dataclass
from typing import Any

from carryon.cache.alignment.known_text import byte_names
from carryon.cache.corpus.tokenize import Encoder

_BLANK = "\u2581"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spelling:
    """What a tokenizer writes as it is."""

    missing: bytes
    """Bytes that no token stands for."""
    characters: frozenset[str]
    """Characters that have a token, whatever their bytes."""
    twofold: str
    """Characters whose token also stands for others."""

    def first_lost(self, text: str) -> str:
        """Return a character of a text that is not written as it is; empty for none. Pure."""
        if not self.missing and not self.twofold:
            return ""
        for char in sorted(set(text)):
            is_lost = char not in self.characters and any(
                byte in self.missing for byte in char.encode("utf-8", "surrogatepass")
            )
            if is_lost or char in self.twofold:
                return char
        return ""


def read_spelling(encoder: Encoder) -> Spelling:
    """Return what a BPE tokenizer writes as it is."""
    rules: dict[str, Any] = json.loads(encoder.backend(is_next=False).to_str())
    vocabulary: dict[str, int] = rules["model"]["vocab"]
    if names := byte_names(rules):
        missing = bytes(byte for byte, name in names.items() if name not in vocabulary)
        return Spelling(missing=missing, characters=frozenset(), twofold="")
    has_bytes = bool(rules["model"].get("byte_fallback"))
    return Spelling(
        missing=bytes(
            byte for byte in range(256) if not has_bytes or f"<0x{byte:02X}>" not in vocabulary
        ),
        characters=frozenset(name.replace(_BLANK, " ") for name in vocabulary if len(name) == 1),
        twofold=_BLANK,  # a blank's
    )
