"""Tables of text in aligned columns, plain or as Markdown, and texts beside each other."""

import re
import textwrap
from collections.abc import Sequence
from itertools import zip_longest

COLUMN = 46
"""Characters in each of two columns of text."""
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


def side_by_side(*columns: tuple[str, str]) -> str:
    """Return two texts in columns, each below its title."""
    lines = [[title, "-" * COLUMN, *_wrap(text)] for title, text in columns]
    rows = zip_longest(*lines, fillvalue="")
    return "\n".join(f"{left:<{COLUMN}} | {right}".rstrip() for left, right in rows)


def _wrap(text: str) -> list[str]:
    lines = (textwrap.wrap(line, COLUMN) or [""] for line in text.strip().splitlines())
    return [part for wrapped in lines for part in wrapped]
