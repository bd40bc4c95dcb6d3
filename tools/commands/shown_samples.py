"""Samples for people: on a terminal, in a log, or as a page of HTML.

Text of data is hostile: control characters are shown by their codes, and HTML is escaped.
"""

import html
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TextIO

from carryon.cache.corpus.pieces import Piece, cut_pieces
from carryon.cache.corpus.samples import ROLES, Sample
from carryon.tools.cli.output import visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --grey: #5f6368; --green: #0b5d1e; --tint: #d9f2df; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --grey: #a5aab0; --green: #a9e8b7; --tint: #173d22; }}
}}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }}
h2 {{ font-size: 1rem; margin: 2rem 0 0.5rem; overflow-wrap: anywhere; }}
pre {{ font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 0; padding: 0.75rem; border: 1px solid var(--grey); border-radius: 4px; }}
.sample {{ color: var(--grey); }}
.target {{ color: var(--green); background: var(--tint); }}
.special {{ border: 1px solid; border-radius: 3px; padding: 0 2px; }}
.stop::after {{ content: " stop"; font-style: italic; }}
</style>
<h1>{title}</h1>
<p class="sample">Grey: prompt. <span class="target">Green: target, which the model learns to
write.</span> <span class="special">Boxed</span>: special token.
<span class="special target stop">Marked</span>: where it learns to stop.</p>
{body}
{table}
</html>
"""


def make_page(samples: Sequence[ShownSample], *, title: str, table: str = "") -> str:
    """Return an HTML page that needs nothing else and runs nothing.

    Args:
        samples: in full.
        title: of the page.
        table: text below the samples.
    """
    body = "\n".join(
        f"<h2>{escaped(sample.title)}</h2>\n"
        f'<pre class="sample" dir="auto">{"".join(map(_tagged, sample.pieces))}</pre>'
        for sample in samples
    )
    return _PAGE.format(
        title=escaped(title),
        body=body,
        table=f"<h2>Records</h2>\n<pre>{escaped(table)}</pre>" * bool(table),
    )


def _tagged(piece: Piece) -> str:
    kinds = {"target": piece.is_target, "special": piece.is_special, "stop": piece.is_stop}
    classes = " ".join(name for name, is_so in kinds.items() if is_so)
    text = escaped(piece.text)
    return f'<span class="{classes}">{text}</span>' if classes else text


def escaped(text: str) -> str:
    """Return a text for HTML, with its control characters as codes."""
    return html.escape(visible(text))
