"""Limits on chat templates, which are programs and may come from anyone.

The sandbox of Jinja keeps a template from files and code, not from loops without an end nor from
texts of gigabytes.
"""

import operator
from functools import cache
from typing import Any

MAX_SECONDS = 1.0
"""Of a rendering, which takes milliseconds."""
MAX_LENGTH = 10_000_000
"""Of a text or list that a template multiplies."""
_MAX_BITS = 10_000


class TemplateLimitError(ValueError):
    """A template takes more memory than any that is meant."""


@cache
def compile_limited(source: str) -> Any:  # noqa: ANN401 -- a template of Jinja
    """Return a template as transformers compiles it, whose products are limited."""
    # Its own function: apply_chat_template copies all messages at each of many calls
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template("").environment
    environment.intercepted_binops = frozenset(["*", "**"])  # not computed while compiling either
    environment.binop_table = {**environment.binop_table, "*": _multiply, "**": _power}
    return environment.from_string(source)


def _multiply(left: Any, right: Any) -> Any:  # noqa: ANN401 -- values of a template
    for many, number in ((left, right), (right, left)):
        if isinstance(number, int) and hasattr(many, "__len__") and len(many) * number > MAX_LENGTH:
            raise TemplateLimitError(f"it makes a text or list of more than {MAX_LENGTH:,}")
    return operator.mul(left, right)


def _power(left: Any, right: Any) -> Any:  # noqa: ANN401 -- values of a template
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_BITS:
        raise TemplateLimitError(f"it makes a number of more than {_MAX_BITS:,} bits")
    return operator.pow(left, right)
