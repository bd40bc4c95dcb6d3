"""Compare answers: numbers as numbers, other texts without case, space and a final full stop."""

import re
from fractions import Fraction

NUMBER = re.compile(
    r"(?<![\w.])(?:[-+\u2212]?[$\u20ac\u00a3]?|[$\u20ac\u00a3][-\u2212])"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)\.\d+|(?<!\d)\.\d+)?(?<=\d)"
    r"(?:[eE][-+]?\d{1,3}(?!\d)|\s?/\s?\d+(?![\d/.]))?"
)
"""Such as 1,000, -3.5, $12, 3/4 and 1e-5. A minus behind a digit or letter subtracts."""
_SIGNS = re.compile(r"[,\s$\u20ac\u00a3]")
_MAX_CHARS = 400
"""Longer ones are no numbers; Python would refuse to read some of them."""
_LATEX = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|\\[,;:!\s]|\\(?=[$%])")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_BEFORE, _BEHIND = " \t\r\n*_`\"'", " \t\r\n*_`\"'.,;"
_DOLLARS = re.compile(r"\$(.*)\$", re.DOTALL)


def find_numbers(text: str) -> list[str]:
    """Return the numbers in a text, as written, in order."""
    return [match[0].strip() for match in NUMBER.finditer(text)]


def parse_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number; None for any other."""
    if len(text) > _MAX_CHARS or not NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(_SIGNS.sub("", text).replace("\u2212", "-"))
    except (ValueError, ZeroDivisionError):
        return None


def get_value(text: str) -> Fraction | None:
    """Return the value of a text that is a number, perhaps with %, a unit of one word or LaTeX."""
    plain = _plain(text)
    match = NUMBER.match(plain)
    if match is None or not re.fullmatch(r"\s*(?:%|[^\W\d]+)?\s*", plain[match.end() :]):
        return None
    return parse_number(match[0].strip())


def is_same(text: str, right: str) -> bool:
    """Return whether two answers are the same: as numbers if both are, else as texts."""
    values = get_value(text), get_value(right)
    if None not in values:
        return values[0] == values[1]
    return _folded(text) == _folded(right)


def ends_with(text: str, right: str) -> bool:
    """Return whether a text ends with an answer, which begins a word there."""
    whole, end = _folded(text), _folded(right)
    if not end or not whole.endswith(end):
        return False
    before = whole[: len(whole) - len(end)]
    return not (before[-1:].isalnum() and end[0].isalnum())


def _plain(text: str) -> str:
    text = _FRACTION.sub(r"\1/\2", text)
    text = _LATEX.sub(lambda match: match[1] or "", text).lstrip(_BEFORE).rstrip(_BEHIND)
    inside = _DOLLARS.fullmatch(text)  # LaTeX
    return inside[1].strip() if inside else text


def _folded(text: str) -> str:
    return " ".join(_plain(text).casefold().split())
