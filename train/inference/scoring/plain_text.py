"""Plain text of answers that models write in LaTeX and Markdown; pure."""

import re

_THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,)(?=\d{3}(?!\d))")
_DEGREE = re.compile(
    r"(?<=\d)\s*(?:\\,)?\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})"
    r"|(?<=\d)\s*\\degree(?![a-zA-Z])"
)
_POWER = re.compile(
    r"(?<=\d)\s*(?:\\times|\\cdot|\u00d7|\*)\s*10\s*\^\s*"
    r"(?:\{\s*([-\u2212]?\d{1,3})\s*\}|([-\u2212]?\d{1,3})(?!\d))"
)
_FRACTION = re.compile(r"(?:(?<=\d)())?\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_GAP = re.compile(r"(?<=\d)(?:\\[,;:\s]|~)*(?=\\(?:text|mathrm|operatorname)\s*\{\s*[^\W\d_])")
_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it)?|math(?:rm|bf|it)|underline|operatorname|fbox|boxed)\s*\{([^{}]*)\}"
)
_COMMAND = re.compile(
    r"\\[,;:!\s]|\\(?=[$%])|\\[()\[\]{}]"
    r"|\\(?:left|right|approx|quad|qquad|displaystyle|large|bf)(?![a-zA-Z])"
)
_BOLD = re.compile(r"(?<![\d)])\*\*|\*\*(?![\d(])|`")
_ITALIC = re.compile(r"(?<![\w*)])\*(?=[^\s*])([^*\n]*)(?<=[^\s*])\*(?![\w*(])")
_BEFORE, _BEHIND = " \t\r\n*_`\"'", " \t\r\n*_`\"'.,;"
_DOLLARS = re.compile(r"\$(.*)\$", re.DOTALL)


def with_plain_numbers(text: str) -> str:
    """Return a text whose numbers are written plainly: 1,000, 148 degrees, 1.5e3, 3/4, 1 1/2."""
    text = _DEGREE.sub("\u00b0", _THOUSANDS.sub(",", text))
    text = _POWER.sub(lambda match: "e" + (match[1] or match[2]).replace("\u2212", "-"), text)
    return _FRACTION.sub(_write_fraction, text)


def without_marks(text: str) -> str:
    """Return a text with plain numbers and without the marks of LaTeX and Markdown around words."""
    text = _GAP.sub(" ", with_plain_numbers(text))
    for _ in range(2):  # one in another
        text = _WRAPPER.sub(r"\1", text)
    return _BOLD.sub(" ", _ITALIC.sub(r"\1", _COMMAND.sub("", text)))


def to_plain(text: str) -> str:
    """Return an answer without marks, nor quotes and punctuation around it."""
    text = without_marks(text).lstrip(_BEFORE).rstrip(_BEHIND)
    inside = _DOLLARS.fullmatch(text)  # LaTeX
    return inside[1].strip() if inside else text


def _write_fraction(match: re.Match[str]) -> str:
    gap = "" if match[1] is None else " "  # 1\\frac{1}{2} is one and a half, not 11/2
    return f"{gap}{match[2].strip()}/{match[3].strip()}"
