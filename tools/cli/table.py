"""Tables of text in aligned columns, plain or as Markdown."""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"[-+(<>= ]*[\d,.]+(e[-+]?\d+)?%?\)?|-?")


def format_table(rows: Sequence[Sequence[str]], *, is_markdown: bool = False) -> str:
    """Return rows as lines of aligned columns; columns of numbers are aligned right.

    Args:
        rows: cells of equal number; the first row is the heading.
        is_markdown: write a Markdown table, which stays readable as plain text.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    is_right = [all(map(_NUMBER.fullmatch, column[1:])) for column in columns]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_right, strict=True)
        ]
        lines.append(f"| {' | '.join(cells)} |" if is_markdown else "  ".join(cells).rstrip())
    if is_markdown:
        rule = [
            "-" * (width + 1) + (":" if right else "-")
            for width, right in zip(widths, is_right, strict=True)
        ]
        lines.insert(1, f"|{'|'.join(rule)}|")
    return "\n".join(lines)
