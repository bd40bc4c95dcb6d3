"""Compare answers: numbers as numbers, other texts without case, space and a final full stop."""

import re
from fractions import Fraction

from carryon.train.inference.scoring.plain_text import to_plain, with_plain_numbers, without_marks

_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NUMBER = re.compile(
    r"(?<![\w.])(?:[-+\u2212]?[$\u20ac\u00a3]?|[$\u20ac\u00a3][-\u2212])"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)\.\d+|(?<!\d)\.\d+)?(?<=\d)"
    r"(?:[eE][-+]?\d{1,3}(?!\d)|\s?/\s?\d+(?!\d|[/.]\d)|[ ]\d+/\d+(?!\d|[/.]\d))?"
    rf"(?:\s(?i:{'|'.join(_SCALES)})\b)?"
)
"""Such as 1,000, -3.5, $12, 3/4, 1 1/2, 2 million and 1e-5. A minus behind a digit subtracts."""
_MIXED = re.compile(r"([-+]?)(\d+) (\d+)/(\d+)")
_MINUS = re.compile(r"(?:[=(]|\bis)[ \t]*[-\u2212][ \t]\Z")
"""Before a number: a sign that stands apart, and subtracts from nothing."""
_LONE_MINUS = re.compile(r"[-\u2212\u2013]\s*(?=[\d.$][^\s]*\Z)")
_NEAR_CHARS = 16
"""Before a number that are looked at."""
_CURRENCY = re.compile(r"[$\u20ac\u00a3]")
_SIGNS = re.compile(r"[,\s$\u20ac\u00a3]")
_MAX_CHARS = 400
"""Longer ones are no numbers; Python would refuse to read some of them."""
_EXPONENT = re.compile(r"(?<=[^\W\d_])(\}?)\s?\^\s?(?:\{-?\d+\}|\d+)")
"""Of a unit or variable: no number."""
_GLUED = frozenset(
    [
        *("km", "cm", "mm", "kg", "mg", "lb", "lbs", "oz", "ft", "mi", "ml", "px"),
        *("hr", "hrs", "min", "ms", "am", "pm", "mph", "kb", "mb", "gb", "kw", "kwh"),
    ]
)
"""Units that may stand behind a number without a space; `34b` is no number, but one to base 16."""
MEASURES = _GLUED | {"m", "g", "s", "h", "l", "%"}
"""Units of which another one is another answer; a word, such as legs, may be any."""
_UNIT = re.compile(
    rf"\s*(?P<percent>%|percent\b)|\s+(?P<word>[^\W\d_]+)|(?P<glued>(?i:{'|'.join(_GLUED)}))\b"
    r"|(?P<degree>\s?\u00b0)"
)
_REST = re.compile(r"\s*\Z")
_REASON = re.compile(
    rf"((?:{NUMBER.pattern})\$?(?:\s[^\W\d_]+)?)\s*[,;.(]?\s*\b(?:because|since|as|for|due)\b"
)
"""A number and then why: sums behind it do not count."""
_ENUMERATION = re.compile(r"[\s\d,.;$+-]*(?:\s(?:and|or)\s[\s\d,.;$+-]*)?")
_OPERATION = r"\\(?:sqrt|pi|times|cdot|div|pm)\b"
_FORMULA_BEFORE = re.compile(
    r"(?:[\^_/+\u00d7\u00f7\u221a\u00b1<\u2264\u2265\u00b7]|(?<![-=])>|(?:\\[a-z]+|[\^_}])\{"
    r"|[\w)][ \t]*\*|(?:\d|\b\w)\(|[\d)][ \t]*[-\u2212\u2013]|\b\w[ \t]+[-\u2212]"
    rf"|{_OPERATION})[ \t]*\Z"
)
_FORMULA_BEHIND = re.compile(
    r"[ \t]*(?:[\^+\u00d7\u00f7\u221a<>\u2264\u2265\u00b7]|\*[ \t]*[\w(]|/[ \t]*(?:\d|\(|\w\b)"
    rf"|[-\u2212\u2013][ \t]*(?:\d|\(|[b-z]\b)|:[ \t]*\d|{_OPERATION})"
    r"|\(|(?![mgshl])[^\W\d_](?![^\W\d_])"
)


def find_numbers(text: str) -> list[str]:
    """Return the numbers in a text, in order, as written but for LaTeX."""
    text = _EXPONENT.sub(r"\1", with_plain_numbers(text))
    return [_signed(text, match) for match in NUMBER.finditer(text)]


def find_stated(text: str, *, begins: bool = True) -> str | None:
    """Return the number that a sentence states; None where it is part of a formula.

    Args:
        text: such as `12 + 4 = 16 legs`, of which what follows the last `=` counts; but not
            `x^2`, `12 - 5`, `16, 25` or `(3, 4)`.
        begins: take the number that the sentence begins with, if it does; else its last one.
    """
    part = to_plain(text) if begins else without_marks(text)
    if begins:
        reason = _REASON.match(part)
        part = reason[1] if reason else to_plain(part.rpartition("=")[2])
        if part[:1] in "([{" and part[-1:] in ")]}" and "," in part:
            return None
    part = _EXPONENT.sub(r"\1", part)
    matches = list(NUMBER.finditer(part))
    if not matches or (begins and len(matches) > 1 and _ENUMERATION.fullmatch(part)):
        return None
    chosen = matches[0] if begins and not matches[0].start() else matches[-1]
    before, behind = part[max(0, chosen.start() - _NEAR_CHARS) : chosen.start()], chosen.end()
    if _FORMULA_BEFORE.search(before):
        return None
    if _FORMULA_BEHIND.match(part, behind) and not _UNIT.match(part, behind):
        return None
    return _signed(part, chosen)


def parse_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number; None for any other."""
    if len(text) > _MAX_CHARS or not NUMBER.fullmatch(text):
        return None
    digits, _, word = text.rpartition(" ")
    scale = _SCALES.get(word.casefold(), 0)
    plain = (digits if scale else text).replace("\u2212", "-")
    try:
        if mixed := _MIXED.fullmatch(_CURRENCY.sub("", plain)):
            value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
            value = -value if mixed[1] == "-" else value
        else:
            value = Fraction(_SIGNS.sub("", plain))
    except (ValueError, ZeroDivisionError):
        return None
    return value * (scale or 1)


def get_value(text: str) -> Fraction | None:
    """Return the value of a text that is a number, perhaps with %, a unit of one word or LaTeX."""
    quantity = get_quantity(text)
    return None if quantity is None else quantity[0]


def get_quantity(text: str) -> tuple[Fraction, str] | None:
    """Return value and unit of a text that is a number as of `get_value`; "" for no unit."""
    plain = _LONE_MINUS.sub("-", to_plain(text), count=1) if len(text) <= _MAX_CHARS else ""
    if (match := NUMBER.match(plain)) is None:
        return None
    unit = _UNIT.match(plain, match.end())
    if not _REST.match(plain, unit.end() if unit else match.end()):
        return None
    value = parse_number(match[0].strip())
    return None if value is None else (value, _name_of(unit))


def unit_behind_last(text: str) -> str:
    """Return the word behind the last number of a text, as `get_quantity`; "" for none."""
    plain = _EXPONENT.sub(r"\1", without_marks(text))
    matches = list(NUMBER.finditer(plain))
    return _name_of(_UNIT.match(plain, matches[-1].end())) if matches else ""


def is_other_unit(first: str, second: str) -> bool:
    """Return whether two units are different measures; a word may mean any."""
    return first != second and {first, second} <= MEASURES


def is_same(text: str, right: str) -> bool:
    """Return whether two answers are the same: as numbers if both are, else as texts."""
    first, second = get_quantity(text), get_quantity(right)
    if first and second:
        return first[0] == second[0] and not is_other_unit(first[1], second[1])
    return _folded(text) == _folded(right)


def is_as_reduced(number: str, right: str) -> bool:
    """Return whether a number is a fraction, as written, only where the right answer is that."""
    if "/" not in number:
        return True
    return _bare(number) == _bare(right)


def ends_with(text: str, right: str) -> bool:
    """Return whether a text ends with an answer, which begins a word there."""
    whole, end = _folded(text), _folded(right)
    if not end or not whole.endswith(end):
        return False
    before = whole[: len(whole) - len(end)]
    return not (before[-1:].isalnum() and end[0].isalnum())


def _signed(text: str, match: re.Match[str]) -> str:
    number, start = match[0].strip(), match.start()
    is_minus = number[0].isdigit() and _MINUS.search(text[max(0, start - _NEAR_CHARS) : start])
    return f"-{number}" if is_minus else number


def _name_of(unit: re.Match[str] | None) -> str:
    if unit is None or unit["degree"]:
        return ""
    if unit["percent"]:
        return "%"
    name = (unit["word"] or unit["glued"]).casefold()
    return name[:-1] if name in ("lbs", "hrs") or (len(name) > 3 and name[-1] == "s") else name


def _bare(text: str) -> str:
    return re.sub(r"[\s$]", "", to_plain(text))


def _folded(text: str) -> str:
    return " ".join(to_plain(text).casefold().split())
