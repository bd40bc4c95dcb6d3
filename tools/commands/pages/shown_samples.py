"""Samples for people, on a terminal or in a log; `samples` has them as HTML.

Text of data is hostile: control characters are shown by their codes.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TextIO

from carryon.cache.corpus.pieces import Piece, cut_pieces
from carryon.cache.corpus.samples import ROLES, Sample
from carryon.cache.errors import InputError
from carryon.tools.cli.output import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from carryon.cache.store.reader import Store

LEGEND = "prompt, [[target]], {special token}, {end token = stop}"
_RESET, _GREY, _GREEN, _BOX = "\x1b[0m", "\x1b[90m", "\x1b[32m", "\x1b[7m"
_MAX_CHARS, _MAX_PIECES = 1200, 400
"""Of a piece, and of a sample, on a terminal; the middle of what is longer is left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownSample:
    """A sample with its text."""

    kind: str
    id: str
    where: str
    """File and line, or store and number."""
    num_tokens: int
    num_targets: int
    marks: Sequence[str]
    """Such as `held out`."""
    pieces: Sequence[Piece]

    @property
    def title(self) -> str:
        """Return kind, id, counts and marks on one line."""
        facts = [f"{self.num_tokens:,} tokens", f"{self.num_targets:,} targets", *self.marks]
        return f"{self.kind}  {visible(self.id)}  {', '.join(facts)}  ({visible(self.where)})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def show_sample(
    sample: Sample,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    kind: str,
    where: str,
    end_tokens: Sequence[int],
    more: str = "",
) -> ShownSample:
    """Return a sample with its text, decoded from its tokens.

    Args:
        sample: of a corpus.
        tokenizer: of the base.
        kind: of its record.
        where: its origin.
        end_tokens: ids that end generation.
        more: a further remark.
    """
    marks = [f"{ROLES[sample.role]} answer"] * bool(sample.role)
    marks += ["held out"] * sample.is_held_out
    marks += [more] * bool(more)
    return ShownSample(
        kind=kind,
        id=sample.id,
        where=where,
        num_tokens=len(sample.tokens),
        num_targets=int(sample.loss_mask.sum()),
        marks=marks,
        pieces=cut_pieces(
            tokenizer, sample.tokens.tolist(), sample.loss_mask.tolist(), end_tokens=end_tokens
        ),
    )


def has_colours(stream: TextIO) -> bool:
    """Return whether a stream is a terminal on which colours are welcome."""
    is_plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not is_plain


def format_sample(sample: ShownSample, *, is_coloured: bool) -> str:
    """Return a sample as text: below its title the prompt grey, targets green, special tokens
    reversed; without colours in brackets, as LEGEND explains."""
    parts = [sample.pieces]
    half = _MAX_PIECES // 2
    if len(sample.pieces) > _MAX_PIECES:
        parts = [sample.pieces[:half], sample.pieces[-half:]]
    note = f"\n[... {len(sample.pieces) - 2 * half:,} parts are not shown here ...]\n"
    if is_coloured:
        shown = note.join("".join(map(_coloured, part)) for part in parts)
        return f"\x1b[1m{sample.title}{_RESET}\n{shown}"
    return f"--- {sample.title}\n{note.join(map(_bracketed, parts))}"


def _coloured(piece: Piece) -> str:
    colour = _GREEN if piece.is_target else _GREY
    if piece.is_special:
        return f"{colour}{_BOX}{_name(piece)}{_RESET}"
    return f"{colour}{_shortened(piece.text)}{_RESET}"


def _bracketed(pieces: Sequence[Piece]) -> str:
    parts = []
    for is_target, group in groupby(pieces, key=lambda piece: piece.is_target):
        text = "".join(
            f"{{{_name(piece)}}}" if piece.is_special else _shortened(piece.text) for piece in group
        )
        parts.append(f"[[{text}]]" if is_target else text)
    return "".join(parts)


def _name(piece: Piece) -> str:
    return visible(piece.text) + " = stop" * piece.is_stop


def _shortened(text: str) -> str:
    if len(text) <= _MAX_CHARS:
        return visible(text)
    half = _MAX_CHARS // 2
    note = f"[... {len(text) - 2 * half:,} characters are not shown here ...]"
    return f"{visible(text[:half])}\n{note}\n{visible(text[-half:])}"


def print_samples(samples: Sequence[ShownSample]) -> None:
    """Print samples to stdout, in colour where it is a terminal."""
    is_coloured, encoding = has_colours(sys.stdout), sys.stdout.encoding or "ascii"
    if not is_coloured:
        print(LEGEND)
    for sample in samples:
        text = format_sample(sample, is_coloured=is_coloured)
        print(f"\n{text.encode(encoding, 'backslashreplace').decode(encoding)}")


def index_of(store: "Store", name: str) -> int:
    """Return the index of the sample that an id, or else a number, names.

    Raises:
        InputError: there is no such sample.
    """
    try:
        return store.index_of(name)
    except InputError as error:
        is_number = name.isascii() and name.isdecimal() and len(name) < 19
        if is_number and int(name) < store.num_samples:
            return int(name)
        raise InputError(
            f"--sample: expected an id, or a number from 0 to {store.num_samples - 1}, got {name!r}"
        ) from error
