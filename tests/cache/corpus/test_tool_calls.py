"""Calls of tools in the one form that chat templates read."""

import json
from typing import Any

import pytest

from carryon.cache.corpus.formats.tool_calls import read_calls, read_tools


def calls_of(*calls: Any, drops_nulls: bool = False) -> list[dict[str, Any]]:  # noqa: ANN401
    """Return calls as chat templates see them."""
    return read_calls({"tool_calls": list(calls)}, "messages[0]", drops_nulls=drops_nulls)


def test_arguments_given_as_text_are_parsed() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"b": [1]}}}
    text = {**call, "function": {"name": "f", "arguments": '{"b": [1]}'}}
    assert calls_of(call) == calls_of(text) == [call]


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_may_have_no_arguments(arguments: Any) -> None:  # noqa: ANN401
    assert calls_of({"name": "f", "arguments": arguments}) == [
        {"type": "function", "function": {"name": "f", "arguments": {}}}
    ]


def test_a_call_without_its_wrapper_gets_one() -> None:
    assert calls_of({"name": "f", "arguments": {"a": 1}, "id": "x"}) == [
        {"type": "function", "id": "x", "function": {"name": "f", "arguments": {"a": 1}}}
    ]


def test_nulls_that_a_table_filled_in_are_dropped_at_every_depth() -> None:
    call = {
        "id": None,
        "function": {"name": "f", "arguments": {"a": None, "b": [{"c": None, "d": 1}, None]}},
    }
    assert calls_of(call, drops_nulls=True) == [
        {"type": "function", "function": {"name": "f", "arguments": {"b": [{"d": 1}, None]}}}
    ]


def test_nulls_that_a_user_wrote_are_kept() -> None:
    arguments = {"a": None, "b": [{"c": None}]}
    for is_table, value in (
        (False, arguments),
        (False, json.dumps(arguments)),
        (True, json.dumps(arguments)),
    ):
        call = {"function": {"name": "f", "arguments": value}}
        (read,) = calls_of(call, drops_nulls=is_table)
        assert read["function"]["arguments"] == arguments


def test_tools_may_be_a_list_a_json_text_or_of_the_older_form() -> None:
    function = {"name": "f", "parameters": {"type": "object", "default": None}}
    tools = [{"type": "function", "function": function}]
    for fields in (
        {"tools": tools},
        {"tools": json.dumps(tools)},
        {"functions": [function], "tools": None},
        {"functions": json.dumps([function])},
    ):
        assert read_tools(fields, "row 1", drops_nulls=False) == tools
    assert read_tools({"tools": json.dumps(tools)}, "row 1", drops_nulls=True) == tools
    for empty in ({}, {"tools": None}, {"tools": []}, {"tools": "[]"}, {"tools": ""}):
        assert read_tools(empty, "row 1", drops_nulls=False) is None
