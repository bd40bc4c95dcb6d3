"""Places in a text that no later text can move a token over, from the beginning of the text alone.

A byte-level BPE cuts a text into pieces by regular expressions, and merges within a piece only.
What follows can change the last piece, and with it white space before it, a letter before an
apostrophe, digits that are grouped from the right, or letters without case before a capital. A BPE
without such pieces merges over the whole text, but no token crosses two neighbouring characters
that stand together in no token.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from carryon.cache.corpus.tokenize import Encoder
from carryon.cache.errors import InputError

_KEEPING = {"Split", "Digits", "ByteLevel", "Punctuation"}
SPACE = "\u2581"
"""With which SentencePiece's vocabularies write a blank."""
_LONGEST_CONTRACTION = 3
_CASELESS, _CAPITALS = {"Lo", "Lm", "Mn", "Mc", "Me"}, {"Lu", "Lt"}


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundaryRules:
    """What of a tokenizer decides which boundaries are stable."""

    has_pieces: bool
    """Whether regular expressions cut the text; else `pairs` decides."""
    joins_contractions: bool
    """Whether `'s` belongs to the piece of the word before it."""
    counts_from_right: bool
    """Whether a digit more moves the boundaries between groups of digits."""
    joins_capitals: bool
    """Whether a small letter behind a capital joins it to letters without case before it."""
    pairs: frozenset[str]
    """Two neighbouring characters of some token."""
    added_parts: frozenset[str]
    """Proper beginnings of the added tokens."""
    added_starts: str
    """First characters of the added tokens."""
    is_nfc: bool
    """Whether texts are normalized to NFC."""

    def first_unstable(self, text: str, starts: Sequence[int]) -> int:
        """Return the index of the first piece that what follows `text` can change. Pure.

        0 says that there may be more in what stands before `text`, if anything does.

        Args:
            text: some pieces at the end of what is known.
            starts: first character of each piece in it.
        """
        last = len(starts) - 1
        opened = self.opened_at(text)
        while last and starts[last] > opened:
            last -= 1
        if not self.has_pieces:
            return last
        last = _before_blanks(text, starts, last, opened)
        while last and self._hangs_together(
            text[starts[last - 1] : starts[last]], text[starts[last] :]
        ):
            last -= 1
        return last

    def opened_at(self, text: str) -> int:
        """Return where an added token may have begun at the end of a text; else its length."""
        places = [text.find(first) for first in self.added_starts if first in text]
        if not places:
            return len(text)
        first = min(places)
        for at in range(first, len(text)):
            if text[at] in self.added_starts and text[at:] in self.added_parts:
                return at
        return len(text)

    def _hangs_together(self, piece: str, rest: str) -> bool:
        if rest.isspace() and piece.isspace():
            return True  # a newline may take in all white space before it
        if self.counts_from_right and rest.isnumeric() and piece.strip().isnumeric():
            return True
        is_caseless = unicodedata.category(piece[-1]) in _CASELESS
        if (
            self.joins_capitals
            and is_caseless
            and set(map(unicodedata.category, rest)) <= _CAPITALS
        ):
            return True
        if piece[-1] == "'" and len(rest) < _LONGEST_CONTRACTION and rest.isalpha():
            return True  # 'l may become the contraction 'll
        return (
            self.joins_contractions
            and rest[0] == "'"
            and len(rest) <= _LONGEST_CONTRACTION
            and not piece[-1].isspace()
        )


def read_rules(encoder: Encoder, *, name: str) -> BoundaryRules:
    """Return the rules of a tokenizer.

    Args:
        encoder: the tokenizer.
        name: of the base, for errors.

    Raises:
        InputError: its tokens cannot be shown to be stable.
    """
    backend = encoder.backend(is_next=False)
    rules: dict[str, Any] = json.loads(backend.to_str())
    model, steps = rules["model"], steps_of(rules.get("pre_tokenizer"), "pretokenizers")
    normalizers = steps_of(rules.get("normalizer"), "normalizers")
    added = list(backend.get_added_tokens_decoder().values())
    has_pieces = any(step.get("type") == "ByteLevel" for step in steps)

    def pieces(text: str) -> list[str]:
        if backend.pre_tokenizer is None:
            return [text]
        return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]

    problem = (
        _model_problem(model)
        or (_piece_problem(steps) if has_pieces else _whole_problem(steps, model))
        or _normalizer_problem(normalizers, has_pieces=has_pieces)
        or _digit_problem(pieces("    1"), pieces("    1a"))
        or next(
            (
                f"an added token, {token.content!r}, that takes in or looks at its neighbours"
                for token in added
                if token.lstrip or token.rstrip or token.single_word
            ),
            "",
        )
    )
    if problem:
        raise InputError(
            f"{name}: expected a tokenizer that can be aligned, got {problem}. Fix: use a base "
            "with a byte-level BPE tokenizer, or a BPE tokenizer without dropout"
        )

    names = [token.content for token in added]
    return BoundaryRules(
        has_pieces=has_pieces,
        joins_contractions=has_pieces and len(pieces("abc's")) == 1,
        counts_from_right=has_pieces and pieces("1234567")[0] != pieces("12345678")[0],
        joins_capitals=has_pieces and len(pieces("\u306eA")) > len(pieces("\u306eAb")),
        pairs=frozenset() if has_pieces else _pairs(model["vocab"], set(names)),
        added_parts=frozenset(name[:end] for name in names for end in range(1, len(name))),
        added_starts="".join(sorted({name[0] for name in names if len(name) > 1})),
        is_nfc=any(step.get("type") == "NFC" for step in normalizers),
    )


def _before_blanks(text: str, starts: Sequence[int], last: int, opened: int) -> int:
    """Return the first piece of white space before an added token that may have begun.

    If it has, the text ends before it, and all white space at the end of a text is one piece. So
    the piece stays `last` where it is one.

    Args:
        text: as in `first_unstable`.
        starts: as in `first_unstable`.
        last: piece at whose beginning, or in which, the added token may have begun.
        opened: where it may have; the length of the text for none.
    """
    first = last
    while first and text[starts[first - 1] : opened].isspace():
        first -= 1
    is_one = starts[last] == opened and first == last - 1
    return last if is_one else first


def _model_problem(model: dict[str, Any]) -> str:
    if model.get("type") != "BPE":
        return f"one of the kind {model.get('type')}, whose tokens depend on all that follows"
    if model.get("dropout"):
        return "a BPE with dropout"
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return "a BPE that marks the ends of words"
    return ""


def _piece_problem(steps: Sequence[dict[str, Any]]) -> str:
    for step in steps:
        if step.get("type") not in _KEEPING or step.get("behavior") == "Removed":
            return f"a pre-tokenizer of the kind {step.get('type')}"
        if step.get("add_prefix_space"):
            return "a byte-level pre-tokenizer that puts a blank before any text"
    return ""


def _digit_problem(alone: list[str], before_letter: list[str]) -> str:
    if alone[0] != before_letter[0] and len(before_letter) > 1:  # a word boundary is looked for
        return "a pre-tokenizer that cuts blanks before digits as the letter behind them says"
    return ""


def _whole_problem(steps: Sequence[dict[str, Any]], model: dict[str, Any]) -> str:
    if model.get("ignore_merges"):
        return "a BPE that looks up whole texts"
    for step in steps:
        is_blank = step.get("type") == "Split" and step.get("pattern") == {"String": " "}
        if step.get("type") != "Metaspace" and not is_blank:
            return f"a pre-tokenizer of the kind {step.get('type')}"
    return ""


def _normalizer_problem(steps: Sequence[dict[str, Any]], *, has_pieces: bool) -> str:
    for step in steps:
        kind = step.get("type")
        is_blank = (
            kind == "Replace"
            and step.get("pattern") == {"String": " "}
            and step.get("content") == SPACE
        )
        is_prefix = kind == "Prepend" and step.get("prepend") == SPACE
        if kind != "NFC" and not (not has_pieces and (is_blank or is_prefix)):
            return f"a normalizer of the kind {kind}, which changes the bytes of a text"
    return ""


def _pairs(vocabulary: Sequence[str], added: set[str]) -> frozenset[str]:
    """Return every two neighbouring characters within a token, a blank for its sign."""
    return frozenset(
        first + second
        for name in vocabulary
        if name not in added
        for first, second in pairwise(name.replace(SPACE, " "))
    )


def steps_of(rules: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a part of a tokenizer, those of sequences within sequences as well.

    Args:
        rules: of its pre-tokenizer or its normalizer, as tokenizer.json has them.
        key: of the steps of a sequence: `pretokenizers` or `normalizers`.
    """
    if rules is None:
        return []
    if rules.get("type") == "Sequence":
        return [step for each in rules[key] for step in steps_of(each, key)]
    return [rules]
