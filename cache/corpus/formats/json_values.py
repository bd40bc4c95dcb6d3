"""JSON values that come from data: checked at every depth, whatever they are."""

import json
from collections.abc import Mapping
from typing import Any

from carryon.cache.errors import InputError

MAX_DEPTH = 64
"""Deepest nesting of lists and objects inside one field."""
_CHUNK_CHARS = 1 << 20


def check_text(value: object, name: str) -> str:
    """Return a string that can be tokenized; the error begins with `name`.

    Raises:
        InputError: it is no string, or contains half of a surrogate pair, which JSON can spell
            and no tokenizer accepts.
    """
    if not isinstance(value, str):
        raise InputError(f"{name}: expected a string, got {describe(value)}")
    if value.isascii():
        return value
    for start in range(0, len(value), _CHUNK_CHARS):  # without a copy of a long text
        try:
            value[start : start + _CHUNK_CHARS].encode()
        except UnicodeEncodeError as error:
            position = start + error.start
            raise InputError(
                f"{name}: expected valid Unicode, got half a surrogate pair {value[position]!a} "
                f"at character {position}. Fix: remove it"
            ) from error
    return value


def check_value(value: object, name: str, *, drops_nulls: bool, depth: int = 0) -> Any:  # noqa: ANN401
    """Return a copy of a JSON value, made of plain lists and dicts.

    Args:
        value: any object.
        name: path of the value, with which errors begin.
        drops_nulls: leave out the keys of objects whose value is null, which a table fills in.
        depth: number of lists and objects around it.

    Raises:
        InputError: it or something in it is no JSON value, is nested more than 64 deep, or is not
            valid Unicode.
    """
    if isinstance(value, str):
        return check_text(value, name)
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth >= MAX_DEPTH:
        raise InputError(f"{_shorten(name)}: expected at most {MAX_DEPTH} levels, got more")
    if isinstance(value, Mapping):
        return {
            check_key(key, name): check_value(
                item, f"{name}.{show_name(key)}", drops_nulls=drops_nulls, depth=depth + 1
            )
            for key, item in value.items()
            if not (drops_nulls and item is None)
        }
    if isinstance(value, list | tuple):
        return [
            check_value(item, f"{name}[{index}]", drops_nulls=drops_nulls, depth=depth + 1)
            for index, item in enumerate(value)
        ]
    raise InputError(f"{name}: expected a JSON value, got {describe(value)}")


def check_key(key: object, name: str) -> str:
    """Return the key of an object; errors as of `check_text`."""
    if not isinstance(key, str):
        raise InputError(f"{name}: expected strings as keys, got {describe(key)}")
    return check_text(key, f"{name}: key")


def decode_json(text: str, name: str) -> Any:  # noqa: ANN401
    """Return the value of a JSON text.

    Raises:
        InputError: it is malformed or nested too deep.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = "too many levels" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{name}: expected JSON, got {quote(text)}: {problem}") from error


def describe(value: object) -> str:
    """Return the type of a wrong value as an error names it."""
    names = {type(None): "null", dict: "an object", list: "a list", bool: str(value).lower()}
    return names.get(type(value), type(value).__name__)


def quote(value: object) -> str:
    """Return the beginning of a value, quoted, on one line, without control characters."""
    return _shorten(ascii(value[:60] if isinstance(value, str) else value), 60)


def show_name(name: object) -> str:
    """Return a column or key as an error names it: quoted if it is long or not plain."""
    is_plain = isinstance(name, str) and len(name) <= 60 and name.isascii() and name.isprintable()
    return str(name) if is_plain else quote(name)


def _shorten(text: str, max_chars: int = 120) -> str:
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."
