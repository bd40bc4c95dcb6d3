"""Compare answers: numbers as numbers, other texts without case, space and a final full stop."""

import re
from fractions import Fraction

_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
NUMBER = re.compile(
    r"(?<![\w.])(?:[-+\u2212]?[$\u20ac\u00a3]?|[$\u20ac\u00a3][-\u2212])"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?:(?<=\d)\.\d+|(?<!\d)\.\d+)?(?<=\d)"
    r"(?:[eE][-+]?\d{1,3}(?!\d)|\s?/\s?\d+(?!\d|[/.]\d))?"
    rf"(?:\s(?i:{'|'.join(_SCALES)})\b)?"
)
"""Such as 1,000, -3.5, $12, 3/4, 2 million and 1e-5. A minus behind a digit or letter subtracts."""
_MINUS = re.compile(r"(?:[=(]|\bis)\s*[-\u2212]\s\Z")
"""Before a number: a sign that stands apart, and subtracts from nothing."""
_MINUS_CHARS = 8
_SIGNS = re.compile(r"[,\s$\u20ac\u00a3]")
_MAX_CHARS = 400
"""Longer ones are no numbers; Python would refuse to read some of them."""
_LATEX = re.compile(
    r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}|\\[,;:!\s]|\\(?=[$%])|\\[()\[\]]"
)
_FRACTION = re.compile(r"(?:(?<=\d)())?\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_BEFORE, _BEHIND = " \t\r\n*_`\"'", " \t\r\n*_`\"'.,;"
_DOLLARS = re.compile(r"\$(.*)\$", re.DOTALL)
MEASURES = frozenset(
    [
        *("km", "cm", "mm", "kg", "mg", "lb", "lbs", "oz", "ft", "mi", "ml", "px"),
        *("hr", "hrs", "min", "ms", "am", "pm", "mph", "kb", "mb", "gb", "kw", "kwh"),
    ]
)
"""Units that may stand behind a number without a space; `34b` is no number, but one to base 16."""
_UNIT = re.compile(
    rf"\s*(?P<percent>%|percent\b)|\s+(?P<word>[^\W\d_]+)|(?P<measure>(?i:{'|'.join(MEASURES)}))\b"
)
_REST = re.compile(r"\s*\Z")
_BOLD = re.compile(r"(?<![\d)])\*\*|\*\*(?![\d(])|`")
_ENUMERATION = re.compile(r"[\s\d,.;$+-]*(?:\s(?:and|or)\s[\s\d,.;$+-]*)?")
_FORMULA_BEFORE = re.compile(
    r"(?:[\^_*/+\u00d7\u00f7\u221a{]|\w\(|[\d)]\s*[-\u2212]|\b\w\s+[-\u2212])\s*\Z"
)
_FORMULA_BEHIND = re.compile(
    r"\s*[\^_*/+\u00d7\u00f7{]|\(|:\d|[^\W\d_]|\s*[-\u2212]\s*(?:\d|\(|\w\b)"
)


def find_numbers(text: str) -> list[str]:
    """Return the numbers in a text, as written, in order."""
    text = _with_fractions(text)
    return [_signed(text, match) for match in NUMBER.finditer(text)]


def find_stated(text: str, *, begins: bool = True) -> str | None:
    """Return the number that a sentence states, as written; None where it is part of a formula.

    Args:
        text: such as `12 + 4 = 16 legs`, of which what follows the last `=` counts; but not
            `x^2`, `12 - 5`, `16, 25` or `(3, 4)`.
        begins: take the number that the sentence begins with, if it does; else its last one.
    """
    part = _BOLD.sub(" ", _plain(text.rpartition("=")[2] if begins else text)).strip()
    matches = list(NUMBER.finditer(part))
    if not matches or (begins and ("\\" in part or _is_enumeration(part, len(matches)))):
        return None
    chosen = matches[0] if begins and not matches[0].start() else matches[-1]
    before, behind = part[: chosen.start()], part[chosen.end() :]
    is_measured = _UNIT.match(behind) is not None
    if _FORMULA_BEFORE.search(before[-_MINUS_CHARS:]):
        return None
    if _FORMULA_BEHIND.match(behind) and not is_measured:
        return None
    return _signed(part, chosen)


def parse_number(text: str) -> Fraction | None:
    """Return the value of a text that is one number; None for any other."""
    if len(text) > _MAX_CHARS or not NUMBER.fullmatch(text):
        return None
    digits, _, word = text.rpartition(" ")
    scale = _SCALES.get(word.casefold(), 0)
    try:
        value = Fraction(_SIGNS.sub("", digits if scale else text).replace("\u2212", "-"))
    except (ValueError, ZeroDivisionError):
        return None
    return value * (scale or 1)


def get_value(text: str) -> Fraction | None:
    """Return the value of a text that is a number, perhaps with %, a unit of one word or LaTeX."""
    quantity = get_quantity(text)
    return None if quantity is None else quantity[0]


def get_quantity(text: str) -> tuple[Fraction, str] | None:
    """Return value and unit of a text that is a number as of `get_value`; "" for no unit."""
    plain = _plain(text)
    if (match := NUMBER.match(plain)) is None:
        return None
    unit = _UNIT.match(plain, match.end())
    if not _REST.match(plain, unit.end() if unit else match.end()):
        return None
    value = parse_number(match[0].strip())
    return None if value is None else (value, _name_of(unit))


def unit_behind_last(text: str) -> str:
    """Return the word behind the last number of a text, as `get_quantity`; "" for none."""
    plain = _plain(text)
    matches = list(NUMBER.finditer(plain))
    return _name_of(_UNIT.match(plain, matches[-1].end())) if matches else ""


def is_same(text: str, right: str) -> bool:
    """Return whether two answers are the same: as numbers if both are, else as texts.

    Units are compared where both have one.
    """
    first, second = get_quantity(text), get_quantity(right)
    if first and second:
        return first[0] == second[0] and (first[1] == second[1] or not (first[1] and second[1]))
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
    is_minus = number[0].isdigit() and _MINUS.search(text[max(0, start - _MINUS_CHARS) : start])
    return f"-{number}" if is_minus else number


def _is_enumeration(part: str, num_numbers: int) -> bool:
    if part[0] in "([{" and part[-1] in ")]}" and "," in part:
        return True
    return num_numbers > 1 and _ENUMERATION.fullmatch(part) is not None


def _name_of(unit: re.Match[str] | None) -> str:
    if unit is None:
        return ""
    if unit["percent"]:
        return "%"
    name = (unit["word"] or unit["measure"]).casefold()
    return name[:-1] if len(name) > 3 and name.endswith("s") else name


def _with_fractions(text: str) -> str:
    # 1\frac{1}{2} is one and a half, not 11/2
    return _FRACTION.sub(
        lambda match: f"{'' if match[1] is None else ' '}{match[2].strip()}/{match[3].strip()}",
        text,
    )


def _plain(text: str) -> str:
    text = _with_fractions(text)
    text = _LATEX.sub(lambda match: match[1] or "", text).lstrip(_BEFORE).rstrip(_BEHIND)
    inside = _DOLLARS.fullmatch(text)  # LaTeX
    return inside[1].strip() if inside else text


def _bare(text: str) -> str:
    return re.sub(r"[\s$]", "", _plain(text))


def _folded(text: str) -> str:
    return " ".join(_plain(text).casefold().split())
