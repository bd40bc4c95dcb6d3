"""The text of a sample, coloured by the base that each of its tokens leaned on, as HTML.

The page needs no network and runs nothing: numbers stand in tooltips.
"""

from collections.abc import Iterator, Sequence

from carryon.tools.commands.pages.document import escaped, make_document
from carryon.train.inference.token_shares import TokenShares

_LIGHT = ("#1a73e8", "#e37400", "#188038", "#a142f4", "#d01884", "#00838f")
_DARK = ("#8ab4f8", "#fcad70", "#81c995", "#d7aefb", "#ff8bcb", "#78d9ec")
_LONGEST = 4
"""Bytes of a character."""


def _variables(colours: Sequence[str]) -> str:
    return " ".join(f"--s{number}: {colour};" for number, colour in enumerate(colours))


_STYLE = (
    f":root {{ {_variables(_LIGHT)} }}\n"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK)} }} }}\n"
    + "".join(
        f".g{number} {{ background: color-mix(in srgb, var(--s{number}) calc(var(--a) * 55%), "
        f"transparent); }}\n.p{number} {{ border-bottom: 2px solid var(--s{number}); }}\n"
        for number in range(len(_LIGHT))
    )
    + """\
body { max-width: 70rem; }
pre { padding: 0.75rem; border: 1px solid var(--grey); border-radius: 4px; line-height: 1.9; }
.prompt { color: var(--grey); }
.special, .bytes { border: 1px solid var(--grey); border-radius: 3px; padding: 0 2px; }
.bytes { font-size: 0.8em; }
table { border-collapse: collapse; }
td, th { padding: 0.2rem 0.8rem; text-align: right; }
td:first-child, th:first-child { text-align: left; }
"""
)
_ABOUT = """\
<p>Background: the base with the largest share of the gate, the stronger the larger its share.
Underline: the base that gave most of the probability of the token. Grey: prompt, which is not
predicted. Hover over a token for its numbers. Boxed: special tokens, and bytes that are only a part
of a character.</p>
"""


def make_gate_page(shares: TokenShares, *, names: Sequence[str], title: str) -> str:
    """Return an HTML page of a sample.

    Args:
        shares: of its tokens.
        names: [T] text of each special token, under its own name; empty for the others.
        title: of the page.
    """
    text = "".join(_tokens(shares, names))
    body = f'{_ABOUT}{_legend(shares)}<pre class="prompt" dir="auto">{text}</pre>'
    return make_document(body, title=title, style=_STYLE)


def _legend(shares: TokenShares) -> str:
    """Return a table of the bases, with their means."""
    gate, parts = shares.gate.mean(axis=0), shares.parts.mean(axis=0)
    leads = shares.gate.argmax(axis=1)
    rows = "".join(
        f'<tr><td><span class="g{_colour(column)} p{_colour(column)}" style="--a: 1">'
        f"{escaped(name)}</span></td><td>{gate[column]:.3f}</td><td>{parts[column]:.3f}</td>"
        f"<td>{int((leads == column).sum()):,}</td></tr>\n"
        for column, name in enumerate(shares.names)
    )
    return (
        "<table><tr><th>base</th><th>share of the gate</th><th>part of the target</th>"
        f"<th>leads at tokens</th></tr>\n{rows}</table>\n"
        f"<p>{len(shares.targets):,} targets, {shares.losses.mean():.4f} nats each; without the "
        f"gate {shares.carryon_losses.mean():.4f}.</p>\n"
    )


def _tokens(shares: TokenShares, names: Sequence[str]) -> Iterator[str]:
    """Yield each token as HTML."""
    places = {int(place): number for number, place in enumerate(shares.targets)}
    texts = token_texts(shares.spelled)
    for place, (name, (text, note)) in enumerate(zip(names, texts, strict=True)):
        classes = ["special"] * bool(name) + ["bytes"] * bool(note)
        title, style = note, ""
        if place in places:
            row = places[place]
            gate, parts = shares.gate[row], shares.parts[row]
            lead = int(gate.argmax())
            classes += [f"g{_colour(lead)}", f"p{_colour(int(parts.argmax()))}"]
            style = f' style="--a: {gate[lead]:.2f}"'
            lines = [
                f"{each}: gate {gate[column]:.3f}, part of the target {parts[column]:.3f}"
                for column, each in enumerate(shares.names)
            ]
            nats = f"{shares.losses[row]:.3f} nats, without the gate "
            lines.append(f"{nats}{shares.carryon_losses[row]:.3f}")
            title = "\n".join([*([note] if note else []), *lines])
        shown = escaped(name or text)
        if classes:
            about = f' title="{escaped(title)}"' if title else ""
            shown = f'<span class="{" ".join(classes)}"{style}{about}>{shown}</span>'
        yield shown


def token_texts(spelled: Sequence[bytes | None]) -> list[tuple[str, str]]:
    """Return the text of each token, and a note where it is not whole characters. Pure.

    Such bytes are shown as codes; the note has the character that they are a part of.

    Args:
        spelled: bytes of each token; None for special ones, whose text is empty.
    """
    texts: list[tuple[str, str]] = []
    data, at = b"".join(token or b"" for token in spelled), 0
    for token in spelled:
        start, at = at, at + len(token or b"")
        try:
            texts.append(((token or b"").decode(), ""))
        except UnicodeDecodeError:
            found = _characters(data, start, at)
            note = f"part of {found}" if found else "bytes that are no text"
            texts.append(((token or b"").decode(errors="backslashreplace"), note))
    return texts


def _characters(data: bytes, start: int, stop: int) -> str:
    """Return the characters that some bytes are a part of; empty if they are none."""
    for first in range(start, max(start - _LONGEST, -1), -1):
        for last in range(stop, min(stop + _LONGEST, len(data) + 1)):
            try:
                return data[first:last].decode()
            except UnicodeDecodeError:
                continue
    return ""


def _colour(column: int) -> int:
    """Return the colour of a base; more than six share them."""
    return column % len(_LIGHT)
