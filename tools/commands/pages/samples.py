"""Samples for people, as a page of HTML."""

from collections.abc import Sequence

from carryon.cache.corpus.pieces import Piece
from carryon.tools.commands.pages.document import escaped, make_document
from carryon.tools.commands.pages.shown_samples import ShownSample

_STYLE = """\
body { max-width: 70rem; }
pre { margin: 0; padding: 0.75rem; border: 1px solid var(--grey); border-radius: 4px; }
.sample { color: var(--grey); }
.target { color: var(--green); background: var(--good); }
.special { border: 1px solid; border-radius: 3px; padding: 0 2px; }
.stop::after { content: " stop"; font-style: italic; }
"""
_LEGEND = """\
<p class="sample">Grey: prompt. <span class="target">Green: target, which the model learns to
write.</span> <span class="special">Boxed</span>: special token.
<span class="special target stop">Marked</span>: where it learns to stop.</p>
"""


def make_sample_page(samples: Sequence[ShownSample], *, title: str, table: str = "") -> str:
    """Return an HTML page of samples.

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
    body += f"\n<h2>Records</h2>\n<pre>{escaped(table)}</pre>" * bool(table)
    return make_document(_LEGEND + body, title=title, style=_STYLE)


def _tagged(piece: Piece) -> str:
    kinds = {"target": piece.is_target, "special": piece.is_special, "stop": piece.is_stop}
    classes = " ".join(name for name, is_so in kinds.items() if is_so)
    text = escaped(piece.text)
    return f'<span class="{classes}">{text}</span>' if classes else text
