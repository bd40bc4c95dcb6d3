"""Rows as records: kinds, ids, splits, and one line for each kind of faulty row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_stores import error_of

from carryon.cache.corpus.files import plan_shards, read_shard
from carryon.cache.corpus.records import (
    MAX_ID_BYTES,
    Chat,
    Completion,
    Content,
    Pair,
    Text,
    check_id,
    kind_of,
    read_record,
    refuse_shared_texts,
)
from carryon.cache.corpus.rows import Row
from carryon.cache.corpus.sources import open_sources
from carryon.cache.errors import InputError
from carryon.cache.settings import DataSettings

USER = {"role": "user", "content": "hi"}
REPLY = {"role": "assistant", "content": "yes"}


def make_row(fields: Mapping[str, Any], **changes: Any) -> Row:  # noqa: ANN401
    """Return line 7 of a file."""
    row = Row(
        fields=fields,
        where="data.jsonl:7",
        made_id="data-12345678-7",
        num_bytes=10,
        is_held_out=False,
        expected="",
    )
    return replace(row, **changes)


def content_of(**fields: Any) -> Content:  # noqa: ANN401
    """Return what a row with these fields holds."""
    return read_record(make_row(fields)).content


def test_each_kind_of_row_is_a_record() -> None:
    chat = Chat(messages=[USER, REPLY], is_trained=[False, True])
    assert content_of(messages=[USER, REPLY]) == chat
    assert content_of(prompt="a", completion="b") == Completion(prompt="a", completion="b")
    assert content_of(prompt="a", response="b") == Completion(prompt="a", completion="b")
    assert content_of(text="c") == Text(text="c")
    assert content_of(prompt="a", chosen="b", rejected="c") == Pair(
        chosen=Completion(prompt="a", completion="b"),
        rejected=Completion(prompt="a", completion="c"),
    )


def test_a_record_keeps_place_and_size_of_its_row() -> None:
    record = read_record(make_row({"text": "a", "other": [1, 2]}))
    assert (record.id, record.where) == ("data-12345678-7", "data.jsonl:7")
    assert (record.num_bytes, record.is_held_out) == (10, False)


def test_the_names_of_fields_that_are_not_null_tell_the_kind() -> None:
    assert kind_of({"messages": [], "prompt": 1, "completion": 2, "text": 3}) == "messages"
    assert kind_of({"conversation": []}) == "messages"
    assert kind_of({"prompt": "", "chosen": "", "rejected": "", "completion": ""}) == (
        "preference pair"
    )
    assert kind_of({"messages": None, "prompt": "", "completion": "", "text": ""}) == (
        "prompt and completion"
    )
    assert kind_of({"prompt": "", "completion": None, "text": ""}) == "text"
    assert kind_of({"prompt": "", "chosen": ""}) == ""


def test_messages_may_be_a_json_text() -> None:
    text = json.dumps([USER, REPLY])
    chat = content_of(messages=[USER, REPLY])
    assert content_of(messages=text) == content_of(conversations=text) == chat
    assert content_of(prompt=json.dumps([USER]), completion=json.dumps([REPLY])) == chat


def test_a_text_that_merely_looks_like_json_stays_a_text() -> None:
    for text in ("[1, 2]", '[{"name": "x"}]', "[", "[]", '["role"]'):
        assert content_of(prompt=text, completion=text) == Completion(prompt=text, completion=text)


def test_of_prompt_and_completion_only_the_completion_is_learned() -> None:
    prompt = [USER, REPLY, USER]
    content = content_of(prompt=prompt, completion=[REPLY, USER, REPLY])
    assert content == Chat(
        messages=[*prompt, REPLY, USER, REPLY],
        is_trained=[False, False, False, True, False, True],
    )
    assert content_of(prompt=prompt, completion="yes") == content_of(
        prompt=prompt, completion=[REPLY]
    )
    assert content_of(prompt="hi", completion=[REPLY]) == content_of(
        prompt=[USER], completion=[REPLY]
    )


def test_the_system_field_of_a_record_becomes_its_first_message() -> None:
    system = {"role": "system", "content": "be kind"}
    assert content_of(messages=[USER, REPLY], system="be kind") == content_of(
        messages=[system, USER, REPLY]
    )
    assert content_of(messages=[USER, REPLY], system="") == content_of(messages=[USER, REPLY])


def test_pairs_begin_with_what_both_answers_share() -> None:
    no = {"role": "assistant", "content": "no"}
    pair = Pair(
        chosen=Chat(messages=[USER, REPLY], is_trained=[False, True]),
        rejected=Chat(messages=[USER, no], is_trained=[False, True]),
    )
    assert content_of(chosen=[USER, REPLY], rejected=[USER, no]) == pair
    assert content_of(prompt=[USER], chosen=[REPLY], rejected=[no]) == pair
    assert content_of(prompt="hi", chosen=[REPLY], rejected=[no]) == pair
    assert content_of(prompt=[USER], chosen="yes", rejected="no") == pair
    assert content_of(prompt="hi", chosen=[USER, REPLY], rejected=[USER, no]) == pair
    assert content_of(prompt=[USER], chosen=[USER, REPLY], rejected=[USER, no]) == pair
    system = {"role": "system", "content": "x"}
    both = {"chosen": [system, USER, REPLY], "rejected": [system, USER, no]}
    assert content_of(prompt="hi", **both) == content_of(**both)


def test_turns_that_both_answers_share_are_not_learned() -> None:
    no = {"role": "assistant", "content": "no"}
    content = content_of(chosen=[USER, REPLY, USER, REPLY], rejected=[USER, REPLY, USER, no])
    assert isinstance(content, Pair)
    assert content.chosen == Chat(
        messages=[USER, REPLY, USER, REPLY], is_trained=[False, False, False, True]
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Human: hi\n\nAssistant: Yes", "Human: hi\n\nAssistant: You", "Human: hi\n\nAssistant:"),
        ("A: I am", "A: I'm", "A:"),
        ("Q\nA:\nyes", "Q\nA:\nno", "Q\nA:\n"),
        ("A: yes", "A:\nyes", "A:"),
        ("a b c", "a b", "a"),
        ("\u4f60\u597d\u5417", "\u4f60\u597d\u5440", "\u4f60\u597d"),
    ],
)
def test_texts_of_a_pair_are_cut_where_their_words_differ(
    chosen: str, rejected: str, prompt: str
) -> None:
    assert content_of(chosen=chosen, rejected=rejected) == Pair(
        chosen=Completion(prompt=prompt, completion=chosen[len(prompt) :]),
        rejected=Completion(prompt=prompt, completion=rejected[len(prompt) :]),
    )


@given(st.text("ab \n", max_size=9), st.text("ab \n", max_size=9), st.text("ab \n", max_size=9))
def test_prompt_and_completions_of_a_pair_give_back_its_texts(
    prompt: str, chosen: str, rejected: str
) -> None:
    try:
        pair = content_of(chosen=prompt + chosen, rejected=prompt + rejected)
    except InputError:
        return  # equal, or without a common beginning
    assert isinstance(pair, Pair)
    texts = []
    for half in (pair.chosen, pair.rejected):
        assert isinstance(half, Completion)
        assert half.prompt
        assert half.completion
        texts.append(half.prompt + half.completion)
    assert texts == [prompt + chosen, prompt + rejected]


def test_a_list_of_the_record_weighs_each_message() -> None:
    messages = [USER, REPLY, USER, REPLY]
    for key in ("loss_mask", "weights"):
        content = content_of(messages=messages, **{key: [0, 0, None, 1.0]})
        assert isinstance(content, Chat)
        assert content.is_trained == [False, False, False, True]


def test_variables_of_the_chat_template_may_be_a_json_text() -> None:
    values = {"enable_thinking": False, "level": None}
    for given_values in (values, json.dumps(values)):
        content = content_of(messages=[USER], chat_template_kwargs=given_values)
        assert isinstance(content, Chat)
        assert content.template_kwargs == values


def test_nulls_of_a_table_are_dropped_from_tools_and_variables() -> None:
    fields = {
        "messages": [{**USER, "name": None}, REPLY],
        "tools": [{"name": "f", "enum": [None, "a"], "parameters": {"a": None, "b": {"c": None}}}],
        "chat_template_kwargs": {"level": None, "deep": {"a": None}},
    }
    from_table = read_record(make_row(fields, has_filled_nulls=True)).content
    assert from_table == Chat(
        messages=[USER, REPLY],
        is_trained=[False, True],
        tools=[{"name": "f", "enum": [None, "a"], "parameters": {"b": {}}}],
        template_kwargs={"deep": {}},
    )
    from_json = read_record(make_row(fields)).content
    assert isinstance(from_json, Chat)
    assert from_json.messages == [USER, REPLY]
    assert from_json.tools == fields["tools"]
    assert from_json.template_kwargs == fields["chat_template_kwargs"]


@pytest.mark.parametrize(
    ("given_id", "identifier"),
    [
        ("first", "first"),
        (7, "7"),
        (-7, "-7"),
        (3.0, "3"),
        (2.5, "2.5"),
        (1e300, "1e+300"),
        (None, "data-12345678-7"),
        ("x" * 223, "x" * 223),
    ],
)
def test_ids_are_strings_or_numbers(given_id: Any, identifier: str) -> None:  # noqa: ANN401
    assert read_record(make_row({"text": "a", "id": given_id})).id == identifier


def test_long_ids_keep_their_beginning_and_differ_by_their_ends() -> None:
    ids = {
        read_record(make_row({"text": "a", "id": "\u00e9" * 500 + end})).id for end in ("a", "b")
    }
    assert len(ids) == 2
    for identifier in ids:
        assert identifier.startswith("\u00e9" * 103 + "~")
        assert len(identifier.encode()) <= MAX_ID_BYTES - 32


@pytest.mark.parametrize(
    ("identifier", "problem"),
    [
        ("a", ""),
        ("\u00e9" * 127 + "a", ""),
        ("\u00e9" * 128, "expected 1 to 255 bytes, got 256"),
        ("a\0", r"expected no NUL character, got 'a\x00'"),
        ("\ud800", r"expected valid Unicode, got '\ud800'"),
    ],
)
def test_ids_that_cannot_be_stored_are_refused(identifier: str, problem: str) -> None:
    expected = f"InputError: x: {problem}" if problem else ""
    assert error_of(lambda: check_id(identifier, where="x")) == expected


def test_test_and_validation_splits_are_held_out() -> None:
    for split, is_held_out in {
        None: False,
        "train": False,
        "held-out": True,
        "test": True,
        "validation": True,
        "dev": True,
    }.items():
        assert read_record(make_row({"text": "a", "split": split})).is_held_out == is_held_out
    assert read_record(make_row({"text": "a", "split": "train"}, is_held_out=True)).is_held_out


def test_a_group_is_a_string_or_number_and_no_id() -> None:
    groups = {
        value: read_record(make_row({"text": "a", "split_group": value})).half
        for value in ("seven", 7, 7.0, "7")
    }
    assert len({groups["seven"], groups[7], "seven", "7"}) == 4
    assert groups[7] == groups["7"]
    plain = read_record(make_row({"text": "a", "id": "seven", "group": "other"}))
    assert plain.half == plain.id == "seven"
    assert read_record(make_row({"text": "a", "split_group": None})).half
    expected = "split_group: expected a string or number, got"
    for wrong in (["a"], True, float("nan")):
        with pytest.raises(InputError, match=expected):
            read_record(make_row({"text": "a", "split_group": wrong}))
    with pytest.raises(InputError, match="split_group: expected valid Unicode"):
        read_record(make_row({"text": "a", "split_group": "\ud800"}))


@dataclass(frozen=True)
class BadRow:
    id: str
    fields: dict[str, Any]
    message: str


def deep(levels: int) -> Any:  # noqa: ANN401
    """Return lists inside each other."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


BAD_ROWS = [
    BadRow(
        "no_kind",
        {"a": 1, "b": 2, "c": None},
        "expected messages, conversations, chosen and rejected, prompt and completion, or text, "
        "got a, b. Fix: --column text=NAME",
    ),
    BadRow(
        "no_completion",
        {"prompt": "a"},
        "expected messages, conversations, chosen and rejected, prompt and completion, or text, "
        "got prompt. Fix: --column text=NAME",
    ),
    BadRow(
        "nothing",
        {},
        "expected messages, conversations, chosen and rejected, prompt and completion, or text, "
        "got nothing. Fix: --column text=NAME",
    ),
    BadRow(
        "strange_names",
        {"\x1b[31m": 1, 3: 1},  # type: ignore[dict-item]
        "expected messages, conversations, chosen and rejected, prompt and completion, or text, "
        r"got '\x1b[31m', 3. Fix: --column text=NAME",
    ),
    BadRow("text_kind", {"text": 3}, "text: expected a string, got int"),
    BadRow("text_object", {"text": {}}, "text: expected a string, got an object"),
    BadRow(
        "surrogate",
        {"text": "ab\ud800"},
        r"text: expected valid Unicode, got half a surrogate pair '\ud800' at character 2. "
        "Fix: remove it",
    ),
    BadRow(
        "prompt_kind",
        {"prompt": [], "completion": "a"},
        "prompt: expected a list of messages, got an empty list",
    ),
    BadRow(
        "completion_kind",
        {"prompt": "a", "completion": 3},
        "completion: expected a string, got int",
    ),
    BadRow(
        "equal_pair",
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        "rejected: expected another answer than chosen, got the same",
    ),
    BadRow(
        "equal_texts",
        {"chosen": "a b", "rejected": "a b"},
        "rejected: expected another answer than chosen, got the same",
    ),
    BadRow(
        "equal_chats",
        {"chosen": [USER, REPLY], "rejected": [USER, REPLY]},
        "rejected: expected another answer than chosen, got the same",
    ),
    BadRow(
        "no_shared_message",
        {"chosen": [REPLY], "rejected": [USER]},
        "chosen and rejected: expected the same beginning, got different first messages. "
        "Fix: give prompt",
    ),
    BadRow(
        "other_prompt",
        {"prompt": "other", "chosen": [USER, REPLY], "rejected": [USER, USER]},
        "chosen and rejected: expected answers, or conversations that begin with prompt, got other "
        "conversations",
    ),
    BadRow(
        "no_shared_text",
        {"chosen": "a", "rejected": "b"},
        "chosen and rejected: expected the same beginning, got none. Fix: give prompt",
    ),
    BadRow(
        "two_systems",
        {"messages": [{"role": "system", "content": "a"}, USER], "system": "b"},
        "system: expected none beside messages[0], which has the role system. "
        "Fix: leave one of them out",
    ),
    BadRow(
        "few_weights",
        {"messages": [USER, REPLY], "loss_mask": [1]},
        "loss_mask: expected a list with a weight for each of 2 messages, got 1",
    ),
    BadRow(
        "weights_kind",
        {"messages": [USER, REPLY], "weights": 0.5},
        "weights: expected a list with a weight for each of 2 messages, got float",
    ),
    BadRow(
        "half_weight",
        {"messages": [USER, REPLY], "weights": [0, 0.5]},
        "weights[1]: expected 0 or 1 (weights between them are not supported), got 0.5",
    ),
    BadRow(
        "tools_kind",
        {"messages": [USER], "tools": {"a": 1}},
        "tools: expected a list of tools, got an object",
    ),
    BadRow(
        "tools_json",
        {"messages": [USER], "tools": "[{"},
        "tools: expected JSON, got '[{': Expecting property name enclosed in double quotes: "
        "line 1 column 3 (char 2)",
    ),
    BadRow(
        "tool_kind", {"messages": [USER], "tools": [1]}, "tools[0]: expected an object, got int"
    ),
    BadRow(
        "kwargs_kind",
        {"messages": [USER], "chat_template_kwargs": [1]},
        "chat_template_kwargs: expected an object, got a list",
    ),
    BadRow(
        "kwargs_name",
        {"messages": [USER], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        "chat_template_kwargs: expected names of variables of a chat template, got 'chat_template'",
    ),
    BadRow(
        "kwargs_value",
        {"messages": [USER], "chat_template_kwargs": {"a": [b"x"]}},
        "chat_template_kwargs.a[0]: expected a JSON value, got bytes",
    ),
    BadRow("id_kind", {"text": "a", "id": True}, "id: expected a string or number, got True"),
    BadRow("id_list", {"text": "a", "id": [1]}, "id: expected a string or number, got [1]"),
    BadRow("id_nan", {"text": "a", "id": float("nan")}, "id: expected a string or number, got nan"),
    BadRow("id_empty", {"text": "a", "id": ""}, "id: expected 1 to 255 bytes, got 0"),
    BadRow("id_nul", {"text": "a", "id": "a\0"}, r"id: expected no NUL character, got 'a\x00'"),
    BadRow(
        "id_surrogate",
        {"text": "a", "id": "\udc00"},
        r"id: expected valid Unicode, got half a surrogate pair '\udc00' at character 0. "
        "Fix: remove it",
    ),
    BadRow(
        "split",
        {"text": "a", "split": "other"},
        "split: expected train, held-out, test or validation, got 'other'. "
        "Fix: --column split=NAME reads another column",
    ),
    BadRow(
        "split_kind",
        {"text": "a", "split": ["train"]},
        "split: expected train, held-out, test or validation, got ['train']. "
        "Fix: --column split=NAME reads another column",
    ),
]


@pytest.mark.parametrize("case", BAD_ROWS, ids=lambda case: case.id)
def test_a_faulty_row_is_refused_in_one_line(case: BadRow) -> None:
    assert error_of(lambda: read_record(make_row(case.fields))) == (
        f"InputError: data.jsonl:7: {case.message}"
    )


def test_values_nested_too_deep_are_refused() -> None:
    problem = error_of(lambda: content_of(messages=[USER], chat_template_kwargs={"a": deep(1000)}))
    assert problem.startswith("InputError: data.jsonl:7: chat_template_kwargs.a[0][0]")
    assert problem.endswith("...: expected at most 64 levels, got more")
    for levels, is_refused in ((61, False), (62, False), (63, True)):
        problem = error_of(
            lambda levels=levels: content_of(  # type: ignore[misc]
                messages=[USER], chat_template_kwargs={"a": deep(levels)}
            )
        )
        assert bool(problem) == is_refused
    text = "[" * 100_000
    assert "tools: expected JSON, got '[[[" in error_of(
        lambda: content_of(messages=[USER], tools=text)
    )


def test_a_long_text_is_checked_to_its_end() -> None:
    text = "\u00e9" * ((1 << 20) + 5)
    assert content_of(text=text) == Text(text=text)
    problem = error_of(lambda: content_of(text=text + "\udc00"))
    assert f"got half a surrogate pair '\\udc00' at character {len(text)}." in problem


def test_two_kinds_in_one_file_are_refused() -> None:
    row = make_row({"text": "a"}, expected="messages")
    assert error_of(lambda: read_record(row)) == (
        "InputError: data.jsonl:7: expected messages, as in the rows before, got text. "
        "Fix: one kind of record a file"
    )
    assert read_record(make_row({"text": "a"}, expected="text")).content == Text(text="a")


NAMES = st.sampled_from(
    [
        *("messages", "conversations", "prompt", "completion", "chosen", "rejected", "text"),
        *("role", "from", "content", "value", "id", "tools", "functions", "tool_calls"),
        *("function_call", "function", "name", "arguments", "weight", "loss_mask", "type"),
        *("chat_template_kwargs", "system", "split", "x"),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text('01[]{}"a', max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(NAMES, JSON, max_size=6), st.booleans())
def test_whatever_a_row_holds_it_is_a_record_or_refused_in_one_line(
    fields: dict[str, Any], has_filled_nulls: bool
) -> None:
    row = make_row(fields, has_filled_nulls=has_filled_nulls)
    problem = error_of(lambda: read_record(row))
    assert not problem or problem.startswith("InputError: data.jsonl:7: ")
    assert "\n" not in problem


def test_equal_texts_in_both_halves_are_refused() -> None:
    train = [
        {"id": "a", "text": "one"},
        {"id": "b", "messages": [{"role": "user", "content": "x"}]},
    ]
    held_out = [{"id": "c", "text": "two", "split": "held-out"}, {"id": "d", "text": "three"}]
    refuse_shared_texts(train, held_out)
    held_out += [{"id": "e", "text": "one"}, {"id": "f", "text": "one"}]
    with pytest.raises(InputError, match="got 2 that are equal, the first is e"):
        refuse_shared_texts(train, held_out)


def test_nulls_are_those_of_the_user_in_json_and_of_the_format_in_tables(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[dict[str, Any]] = [{"city": "Rome", "unit": None}, {"city": None, "days": 2}]
    rows = [
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
                },
            ],
            "tools": [{"type": "function", "function": {"name": "f", "limits": arguments}}],
        }
        for arguments in calls
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dropped = [{"city": "Rome"}, {"days": 2}]
    for data, expected in (
        (tmp_path / "rows.jsonl", calls),
        (tmp_path / "rows.parquet", dropped),
        (table, dropped),
    ):
        sources = open_sources(data, DataSettings(), folder=tmp_path / "cache")
        for shard in plan_shards(sources):
            read = [read_record(row).content for row in read_shard(shard) if isinstance(row, Row)]
        for content, arguments in zip(read, expected, strict=True):
            assert isinstance(content, Chat)
            (call,) = content.messages[1]["tool_calls"]
            assert call == {"type": "function", "function": {"name": "f", "arguments": arguments}}
            assert content.tools == [
                {"type": "function", "function": {"name": "f", "limits": arguments}}
            ]
