"""Messages: the conversations that people have, brought into the form that chat templates read.

    form        a message                       roles
    OpenAI      `role`, `content`, ...          as they are: the chat template decides
    ShareGPT    `from`, `value`                 human, gpt, tool, ... become user, assistant, tool

Content in parts of text becomes one string, `reasoning` and `thinking` become `reasoning_content`,
and `function_call` becomes `tool_calls`. Keys that are null are left out. Weights (`weight`,
`train`, `loss_mask`, `loss`) say whether a turn is learned; the chat template never sees them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from carryon.cache.corpus.formats.json_values import (
    check_key,
    check_text,
    check_value,
    decode_json,
    describe,
    quote,
    show_name,
)
from carryon.cache.corpus.formats.tool_calls import read_calls, read_shared_call
from carryon.cache.errors import InputError

TRAINED_ROLES = ("assistant", "model")
"""Roles whose turns may be targets."""
WEIGHT_KEYS = ("weight", "train", "loss_mask", "loss")
"""Keys of a message that say whether it is learned."""
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")
_MAX_ROLE_CHARS = 64
_SPELLINGS = {
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "chatgpt", "bing", "bard", "claude", "assistant", "model", "bot", "ai"),
    "system": ("system",),
    "developer": ("developer",),
    "tool": ("tool", "function", "observation", "tool_response", "function_response"),
    "function_call": ("function_call", "tool_call"),
}
_ROLES = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}
"""Speaker of a ShareGPT turn -> role; `function_call` is an assistant turn that calls tools."""

Message = dict[str, Any]


def read_messages(
    value: object, name: str, *, drops_nulls: bool, is_shared: bool = False
) -> tuple[list[Message], list[bool]]:
    """Return the messages of a conversation, and for each whether it is learned.

    Args:
        value: a list, or a JSON text of one.
        name: its path, with which errors begin.
        drops_nulls: leave out nulls at every depth, as the data are a table.
        is_shared: also translate a `role` that is one of ShareGPT's names.

    Raises:
        InputError: it is no conversation; the text has the path of the faulty value.
    """
    values = value
    if isinstance(value, str):
        values, drops_nulls = decode_json(value, name), False  # its nulls are the user's own
    if isinstance(values, Mapping) and values:
        values = _rows_of(values, name)
    if not isinstance(values, list | tuple) or not values:
        got = "an empty list" if values == [] else describe(values)
        raise InputError(f"{name}: expected a list of messages, got {got}")
    messages, is_trained = [], []
    has_legacy_calls = False
    for index, item in enumerate(values):
        place = f"{name}[{index}]"
        if not isinstance(item, Mapping):
            raise InputError(f"{place}: expected role and content, got {describe(item)}")
        has_legacy_calls |= item.get("function_call") is not None
        message = _read_message(item, place, drops_nulls=drops_nulls, is_shared=is_shared)
        weight = _weight(item, place)
        is_trained.append(is_learned(weight, message["role"], place))
        messages.append(message)
    if has_legacy_calls:  # what answers such a call has the role `function`
        for message in messages:
            message["role"] = "tool" if message["role"] == "function" else message["role"]
    return messages, is_trained


def looks_like_messages(value: object) -> bool:
    """Return whether a field that may be a text holds messages: a list, or a JSON text of them."""
    if not isinstance(value, str):
        return isinstance(value, list | tuple | Mapping)
    if not value.lstrip().startswith("["):
        return False
    try:
        items = decode_json(value, "")
    except InputError:
        return False
    return bool(items) and all(
        isinstance(item, dict)
        and ({"role", "content"} <= set(item) or {"from", "value"} <= set(item))
        for item in items
    )


def is_learned(weight: bool | None, role: str, name: str) -> bool:
    """Return whether a turn is learned, by its weight (None: the default) and role.

    Raises:
        InputError: the weight asks to learn a turn that is not an assistant's.
    """
    is_assistant = role in TRAINED_ROLES
    if weight and not is_assistant:
        raise InputError(
            f"{name}: weight: expected 0 or none for the role {quote(role)}, got 1: only "
            "assistant turns are learned. Fix: set it to 0"
        )
    return is_assistant and weight is not False


def read_weight(value: object, name: str) -> bool | None:
    """Return a weight: false, true, or None for null.

    Raises:
        InputError: it is neither 0 nor 1.
    """
    if value is None:
        return None
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise InputError(
        f"{name}: expected 0 or 1 (weights between them are not supported), got {quote(value)}"
    )


def _weight(item: Mapping[str, Any], name: str) -> bool | None:
    weights = {read_weight(item.get(key), f"{name}.{key}") for key in WEIGHT_KEYS} - {None}
    if len(weights) > 1:
        raise InputError(f"{name}: expected one weight, got both 0 and 1")
    return weights.pop() if weights else None


def _read_message(
    item: Mapping[str, Any], name: str, *, drops_nulls: bool, is_shared: bool
) -> Message:
    fields = {
        check_key(key, name): value
        for key, value in item.items()
        if value is not None and key not in WEIGHT_KEYS
    }
    role = _take_role(fields, name, is_shared=is_shared)
    if "value" in fields and "content" not in fields:
        fields["content"] = fields.pop("value")
    if role == "function_call":
        role = "assistant"
        calls = read_shared_call(fields.pop("content", None), f"{name}.value")
    else:
        calls = read_calls(fields, name, drops_nulls=drops_nulls)
    message: Message = {"role": role}
    content = fields.pop("content", None)
    if content is None and not calls:
        raise InputError(f"{name}.content: expected a string, got none")
    message["content"] = None if content is None else _read_content(content, f"{name}.content")
    reasoning = _take_reasoning(fields, name)
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    for key, value in fields.items():
        message[key] = check_value(value, f"{name}.{show_name(key)}", drops_nulls=drops_nulls)
    return message


def _take_role(fields: Message, name: str, *, is_shared: bool) -> str:
    """Remove the speaker from `fields` and return the role."""
    speaker = fields.pop("from", None)
    if "role" not in fields:
        if speaker is None:
            raise InputError(f"{name}.role: expected a string, got none")
        known = _ROLES.get(check_text(speaker, f"{name}.from").strip().lower())
        if known is None:
            raise InputError(
                f"{name}.from: expected one of {', '.join(_ROLES)}, got {quote(speaker)}"
            )
        return known
    role = check_text(fields.pop("role"), f"{name}.role")
    if not 1 <= len(role) <= _MAX_ROLE_CHARS:
        raise InputError(
            f"{name}.role: expected 1 to {_MAX_ROLE_CHARS} characters, got {len(role)}"
        )
    return _ROLES.get(role.strip().lower(), role) if is_shared else role


def _read_content(value: object, name: str) -> str:
    if not isinstance(value, list | tuple):
        return check_text(value, name)
    texts = []
    for index, part in enumerate(value):
        place = f"{name}[{index}]"
        if not isinstance(part, Mapping):
            raise InputError(f"{place}: expected a part of text, got {describe(part)}")
        kind = part.get("type")
        if kind is not None and kind not in _TEXT_PARTS:
            raise InputError(f"{place}: expected a part of type text, got {quote(kind)}")
        texts.append(check_text(part.get("text"), f"{place}.text"))
    return "".join(texts)


def _take_reasoning(fields: Message, name: str) -> str | None:
    """Remove the reasoning from `fields` and return it."""
    texts = [
        check_text(fields.pop(key), f"{name}.{key}") for key in _REASONING_KEYS if key in fields
    ]
    if len(set(texts)) > 1:
        raise InputError(f"{name}: expected one reasoning, got {len(texts)} that differ")
    return texts[0] if texts else None


def _rows_of(columns: Mapping[str, Any], name: str) -> Sequence[Message]:
    """Return the rows of a dict of lists, as which some tables store a list of dicts."""
    lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
    if len(lengths) != 1 or lengths == {-1}:
        raise InputError(f"{name}: expected a list of messages, got an object")
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
