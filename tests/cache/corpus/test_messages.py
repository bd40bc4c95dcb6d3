"""Messages of all forms in the one form that chat templates read."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from support.tiny_stores import error_of

from carryon.cache.corpus.formats.messages import read_messages

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "yes"}


def messages_of(*messages: Any, **options: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Return messages as chat templates see them."""
    return read_messages(list(messages), "messages", **{"drops_nulls": False, **options})[0]


def trained(*messages: Any) -> list[bool]:  # noqa: ANN401
    """Return which messages are learned."""
    return read_messages(list(messages), "messages", drops_nulls=False)[1]


def test_messages_of_the_usual_form_are_left_as_they_are() -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": "hi", "name": "Ann"},
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
        {"role": "ipython", "content": "1"},
        {"role": "tool", "content": "2", "tool_call_id": "a", "extra": {"b": [None, {"c": None}]}},
    ]
    assert messages_of(*messages) == messages


def test_null_keys_of_messages_are_left_out() -> None:
    assert messages_of({**USER, "name": None, "tool_calls": None, "reasoning": None}) == [USER]
    deep = {**USER, "extra": {"a": None, "b": [{"c": None, "d": 1}, None]}}
    assert messages_of(deep) == [deep]
    assert messages_of(deep, drops_nulls=True) == [{**USER, "extra": {"b": [{"d": 1}, None]}}]


def test_nulls_in_a_json_text_are_the_users_own_in_a_table_too() -> None:
    deep = {**USER, "extra": {"a": None}}
    assert read_messages(json.dumps([deep]), "messages", drops_nulls=True)[0] == [deep]


def test_parts_of_text_become_one_string() -> None:
    parts = [{"type": "text", "text": "a "}, {"text": "b", "image_url": None}]
    assert messages_of({"role": "user", "content": parts}) == [{"role": "user", "content": "a b"}]


def test_all_spellings_of_reasoning_become_one() -> None:
    expected = [{**REPLY, "reasoning_content": "hm"}]
    for key in ("reasoning_content", "reasoning", "thinking"):
        assert messages_of({**REPLY, key: "hm"}) == expected
    assert messages_of({**REPLY, "reasoning": "hm", "reasoning_content": "hm"}) == expected


def test_a_call_of_the_older_form_and_its_answer_become_tool_messages() -> None:
    call = {"name": "f", "arguments": '{"a": 1}'}
    answer = {"role": "function", "name": "f", "content": "2"}
    assert messages_of({"role": "assistant", "content": None, "function_call": call}, answer) == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
            ],
        },
        {"role": "tool", "name": "f", "content": "2"},
    ]
    assert messages_of(answer) == [answer]


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"),
        ("User", "user"),
        ("gpt", "assistant"),
        ("ChatGPT", "assistant"),
        ("bing", "assistant"),
        ("bard", "assistant"),
        ("ASSISTANT", "assistant"),
        ("model", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("function", "tool"),
        ("observation", "tool"),
    ],
)
def test_speakers_of_shared_conversations_are_known(speaker: str, role: str) -> None:
    assert messages_of({"from": speaker, "value": "a", "weight": None}) == [
        {"role": role, "content": "a"}
    ]
    assert messages_of({"role": speaker, "content": "a"}, is_shared=True)[0]["role"] == role
    assert messages_of({"role": speaker, "content": "a"})[0]["role"] == speaker


def test_a_shared_turn_may_call_tools() -> None:
    call = {"name": "f", "arguments": {"a": None}}
    expected = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": call}],
        }
    ]
    for value in (json.dumps(call), json.dumps([call])):
        assert messages_of({"from": "function_call", "value": value}) == expected
        assert messages_of({"from": "function_call", "value": value}, drops_nulls=True) == expected


def test_a_dict_of_lists_is_read_as_a_list_of_messages() -> None:
    columns = {"role": ["user", "assistant"], "content": ["hi", "yes"], "name": [None, None]}
    assert read_messages(columns, "messages", drops_nulls=True)[0] == [USER, REPLY]


def test_assistant_turns_are_learned_unless_their_weight_is_0() -> None:
    assert trained(USER, REPLY, {"role": "model", "content": "a"}) == [False, True, True]
    for key in ("weight", "train", "loss_mask", "loss"):
        weighted = [{**REPLY, key: value} for value in (0, 1, 0.0, 1.0, False, True, None)]
        assert trained(*weighted) == [False, True, False, True, False, True, True]
        assert messages_of(*weighted) == [REPLY] * 7
    assert trained({**USER, "weight": 0}, {**REPLY, "weight": 0, "train": False}) == [False, False]


@dataclass(frozen=True)
class BadMessage:
    id: str
    message: Any
    problem: str


BAD_MESSAGES = [
    BadMessage("kind", "a", ": expected role and content, got str"),
    BadMessage("no_role", {"content": "a"}, ".role: expected a string, got none"),
    BadMessage("role_kind", {**USER, "role": 3}, ".role: expected a string, got int"),
    BadMessage(
        "role_long", {**USER, "role": "a" * 65}, ".role: expected 1 to 64 characters, got 65"
    ),
    BadMessage(
        "speaker",
        {"from": "narrator", "value": "a"},
        ".from: expected one of human, user, prompter, gpt, chatgpt, bing, bard, claude, "
        "assistant, model, bot, ai, system, developer, tool, function, observation, "
        "tool_response, function_response, function_call, tool_call, got 'narrator'",
    ),
    BadMessage("no_content", {"role": "user"}, ".content: expected a string, got none"),
    BadMessage(
        "null_content",
        {**REPLY, "content": None, "tool_calls": []},
        ".content: expected a string, got none",
    ),
    BadMessage(
        "content_kind", {**USER, "content": {"a": 1}}, ".content: expected a string, got an object"
    ),
    BadMessage(
        "part_kind", {**USER, "content": [1]}, ".content[0]: expected a part of text, got int"
    ),
    BadMessage(
        "image",
        {**USER, "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]},
        ".content[1]: expected a part of type text, got 'image_url'",
    ),
    BadMessage(
        "part_text",
        {**USER, "content": [{"type": "text"}]},
        ".content[0].text: expected a string, got null",
    ),
    BadMessage(
        "surrogate",
        {**USER, "content": "\ud800"},
        r".content: expected valid Unicode, got half a surrogate pair '\ud800' at character 0. "
        "Fix: remove it",
    ),
    BadMessage(
        "surrogate_key",
        {**USER, "\ud800": 1},
        r": key: expected valid Unicode, got half a surrogate pair '\ud800' at character 0. "
        "Fix: remove it",
    ),
    BadMessage("key_kind", {**USER, 3: 1}, ": expected strings as keys, got int"),
    BadMessage("reasoning", {**REPLY, "thinking": 3}, ".thinking: expected a string, got int"),
    BadMessage(
        "two_reasonings",
        {**REPLY, "thinking": "a", "reasoning": "b"},
        ": expected one reasoning, got 2 that differ",
    ),
    BadMessage(
        "half_weight",
        {**REPLY, "weight": 0.5},
        ".weight: expected 0 or 1 (weights between them are not supported), got 0.5",
    ),
    BadMessage(
        "weight_kind",
        {**REPLY, "train": "yes"},
        ".train: expected 0 or 1 (weights between them are not supported), got 'yes'",
    ),
    BadMessage(
        "two_weights", {**REPLY, "train": 1, "loss": 0}, ": expected one weight, got both 0 and 1"
    ),
    BadMessage(
        "user_weight",
        {**USER, "weight": 1},
        ": weight: expected 0 or none for the role 'user', got 1: only assistant turns are "
        "learned. Fix: set it to 0",
    ),
    BadMessage(
        "calls_kind",
        {**REPLY, "tool_calls": {"a": 1}},
        ".tool_calls: expected a list of calls, got an object",
    ),
    BadMessage(
        "call_kind", {**REPLY, "tool_calls": [1]}, ".tool_calls[0]: expected an object, got int"
    ),
    BadMessage(
        "call_name",
        {**REPLY, "tool_calls": [{"function": {"arguments": {}}}]},
        ".tool_calls[0].function.name: expected a string, got null",
    ),
    BadMessage(
        "arguments_kind",
        {**REPLY, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
        ".tool_calls[0].function.arguments: expected an object, got a list",
    ),
    BadMessage(
        "arguments_json",
        {**REPLY, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
        ".tool_calls[0].function.arguments: expected JSON, got '{': Expecting property name "
        "enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    BadMessage(
        "arguments_surrogate",
        {**REPLY, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]},
        r".tool_calls[0].function.arguments.a: expected valid Unicode, got half a surrogate pair "
        r"'\ud800' at character 0. Fix: remove it",
    ),
    BadMessage(
        "both_calls",
        {**REPLY, "tool_calls": [{"name": "f"}], "function_call": {"name": "f"}},
        ": expected tool_calls or function_call, got both",
    ),
    BadMessage(
        "shared_call",
        {"from": "function_call", "value": "3"},
        ".value: expected JSON of a call, got '3'",
    ),
]


@pytest.mark.parametrize("case", BAD_MESSAGES, ids=lambda case: case.id)
def test_a_faulty_message_is_refused_with_its_path(case: BadMessage) -> None:
    assert error_of(lambda: messages_of(USER, case.message)) == (
        f"InputError: messages[1]{case.problem}"
    )


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ([], "an empty list"),
        ({}, "an object"),
        ({"role": ["a"], "content": "b"}, "an object"),
        (3, "int"),
        ("{}", "an object"),
        ("null", "null"),
    ],
)
def test_what_is_no_list_of_messages_is_refused(value: Any, got: str) -> None:  # noqa: ANN401
    assert error_of(lambda: read_messages(value, "messages", drops_nulls=False)) == (
        f"InputError: messages: expected a list of messages, got {got}"
    )
