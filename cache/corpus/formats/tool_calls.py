"""Tools of a conversation and the calls of them, in the one form that chat templates read.

    tool_calls   [{"type": "function", "function": {"name": ..., "arguments": {...}}, ...}]
    tools        [{"type": "function", "function": {"name": ..., "parameters": {...}}}]

Arguments given as a JSON text are parsed: a null in them is the user's own.
"""

from collections.abc import Mapping
from typing import Any

from carryon.cache.corpus.formats.json_values import (
    check_text,
    check_value,
    decode_json,
    describe,
    quote,
)
from carryon.cache.errors import InputError

Call = dict[str, Any]


def read_calls(fields: dict[str, Any], name: str, *, drops_nulls: bool) -> list[Call]:
    """Remove `tool_calls` and `function_call` from a message's fields and return the calls.

    Raises:
        InputError: a call has no name or its arguments are no object; begins with `name`.
    """
    calls, legacy = fields.pop("tool_calls", None), fields.pop("function_call", None)
    if calls and legacy is not None:
        raise InputError(f"{name}: expected tool_calls or function_call, got both")
    if legacy is not None:
        return [_read_call(legacy, f"{name}.function_call", drops_nulls=drops_nulls)]
    place = f"{name}.tool_calls"
    calls = _decoded(calls, place)
    if not isinstance(calls, list | tuple | None):
        raise InputError(f"{place}: expected a list of calls, got {describe(calls)}")
    return [
        _read_call(call, f"{place}[{index}]", drops_nulls=drops_nulls)
        for index, call in enumerate(calls or [])
    ]


def read_shared_call(value: object, name: str) -> list[Call]:
    """Return the calls of a ShareGPT turn `function_call`: JSON of one call, or of several.

    Raises:
        InputError: it is something else.
    """
    calls = _decoded(value, name)
    if isinstance(calls, Mapping):
        return [_read_call(calls, name, drops_nulls=False)]
    if not isinstance(calls, list) or not calls:
        raise InputError(f"{name}: expected JSON of a call, got {quote(value)}")
    return [
        _read_call(call, f"{name}[{index}]", drops_nulls=False) for index, call in enumerate(calls)
    ]


def read_tools(fields: Mapping[str, Any], name: str, *, drops_nulls: bool) -> list[Any] | None:
    """Return the tools of a record, from `tools` or the older `functions`; None for none.

    Raises:
        InputError: they are no list of objects; begins with `name`.
    """
    key = "tools" if fields.get("tools") is not None else "functions"
    place = f"{name}: {key}"
    given = fields.get(key)
    is_text = isinstance(given, str)
    tools = _decoded(given, place) if given != "" else None
    if not isinstance(tools, list | tuple | None):
        raise InputError(f"{place}: expected a list of tools, got {describe(tools)}")
    checked = []
    for index, tool in enumerate(tools or []):
        tool_name = f"{place}[{index}]"
        if not isinstance(tool, Mapping):
            raise InputError(f"{tool_name}: expected an object, got {describe(tool)}")
        value = check_value(tool, tool_name, drops_nulls=drops_nulls and not is_text)
        checked.append(value if key == "tools" else {"type": "function", "function": value})
    return checked or None


def _read_call(call: object, name: str, *, drops_nulls: bool) -> Call:
    if not isinstance(call, Mapping):
        raise InputError(f"{name}: expected an object, got {describe(call)}")
    is_nested = call.get("function") is not None
    function, place = (call["function"], f"{name}.function") if is_nested else (call, name)
    if not isinstance(function, Mapping):
        raise InputError(f"{place}: expected an object, got {describe(function)}")
    others = {"id": call.get("id"), "type": call.get("type")}
    if is_nested:
        others = {key: value for key, value in call.items() if key != "function"}
    others = {key: value for key, value in others.items() if value is not None}
    return {
        "type": "function",
        **check_value(others, name, drops_nulls=drops_nulls),
        "function": {
            "name": check_text(function.get("name"), f"{place}.name"),
            "arguments": _read_arguments(
                function.get("arguments"), f"{place}.arguments", drops_nulls=drops_nulls
            ),
        },
    }


def _read_arguments(value: object, name: str, *, drops_nulls: bool) -> dict[str, Any]:
    if value is None or value == "":  # models write both for no arguments
        return {}
    arguments = _decoded(value, name)
    if not isinstance(arguments, Mapping):
        raise InputError(f"{name}: expected an object, got {describe(arguments)}")
    is_text = isinstance(value, str)
    return dict(check_value(arguments, name, drops_nulls=drops_nulls and not is_text))


def _decoded(value: object, name: str) -> object:
    return decode_json(value, name) if isinstance(value, str) else value
