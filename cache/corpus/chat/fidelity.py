"""Check that a chat template writes the text of every message.

A template that drops a role, a tool call, the reasoning or the content teaches something else than
the data say. Compared without white space, which templates trim, and also in JSON's spelling.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from carryon.cache.corpus.chat.chat_template import UnfitError

Message = Mapping[str, Any]
_MOST_MESSAGES = 16
"""Messages of a conversation that are tried with other texts."""


def refuse_lost_texts(
    text: str, messages: Sequence[Message], indices: Sequence[int], *, template: str
) -> None:
    """Check that the text of messages stands in a rendering.

    Args:
        text: the rendering.
        messages: the conversation.
        indices: messages to check.
        template: its name, for the error.

    Raises:
        UnfitError: names the message and what is missing.
    """
    squeezed, position = "", 0  # texts mostly follow each other
    for index in indices:
        for field, part in _texts(messages[index]):
            if part.strip() in text:
                continue
            squeezed = squeezed or _squeeze(text)
            place = _find(squeezed, part, position)
            if place < 0:
                raise _lost(index, messages[index], field, template)
            position = max(position, place)


def has_text(text: str, part: str) -> bool:
    """Tell whether a part stands in a text, white space aside, or in JSON's spelling."""
    return part in text or _find(_squeeze(text), part, 0) >= 0


def refuse_lost_tools(text: str, tools: Sequence[Mapping[str, Any]], *, template: str) -> None:
    """Check that the names of all tools stand in a rendering.

    Raises:
        UnfitError: names the tool that is missing.
    """
    for tool in tools:
        function = tool.get("function")
        name = (function if isinstance(function, Mapping) else tool).get("name")
        if isinstance(name, str) and name not in text:
            raise UnfitError(
                f"tools: {template} does not write the tool {name}. Fix: --chat-template FILE "
                "with one that does, or --drop-unfit to leave such records out"
            )


def refuse_unread_fields(
    render: Callable[[Sequence[Message]], str],
    messages: Sequence[Message],
    indices: Sequence[int],
    *,
    template: str,
) -> None:
    """Check that messages of this structure are written, whatever their text.

    A short text may stand in the rendering although the template drops the message: "hi" is part
    of "which". So the contents are replaced by words that stand nowhere else.

    Args:
        render: renders messages.
        messages: the conversation.
        indices: messages to check.
        template: its name, for the error.

    Raises:
        UnfitError: as `refuse_lost_texts`.
    """
    marked = [
        {
            **message,
            **{
                field: f"qz{index}x{number}jv"
                for number, field in enumerate(("content", "reasoning_content"))
                if message.get(field)
            },
        }
        for index, message in enumerate(messages[:_MOST_MESSAGES])
    ]
    try:
        text = render(marked)
    except UnfitError:
        return  # the template reads the content, which is checked as it is
    for index in indices:
        for field in ("content", "reasoning_content"):
            is_tried = index < len(marked) and messages[index].get(field)
            if is_tried and str(marked[index][field]) not in text:
                raise _lost(index, messages[index], field, template)


def structure_of(messages: Sequence[Message]) -> tuple[Any, ...]:
    """Return what a template may decide on but the texts: equal structures are written alike."""
    return tuple(
        (
            message.get("role"),
            bool(message.get("content")),
            bool(message.get("reasoning_content")),
            len(message.get("tool_calls") or ()),
        )
        for message in messages[:_MOST_MESSAGES]
    )


def _lost(index: int, message: Message, field: str, template: str) -> UnfitError:
    return UnfitError(
        f"messages[{index}]: {template} does not write the {field} of this {message['role']} "
        "message. Fix: --chat-template FILE with one that does, or --drop-unfit to leave such "
        "records out"
    )


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    """Yield (field, text) of everything that a message says."""
    for field in ("reasoning_content", "content"):
        if isinstance(value := message.get(field), str) and value.strip():
            yield field, value
    for number, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function", call)
        yield f"tool_calls[{number}]", str(function.get("name", ""))
        for leaf in _leaves(function.get("arguments")):
            yield f"tool_calls[{number}] arguments", leaf


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield json.dumps(value)


def _find(squeezed: str, text: str, position: int) -> int:
    """Return where a text stands, in any of its spellings; -1 for nowhere."""
    plain = json.dumps(text, ensure_ascii=False)[1:-1]
    for spelling in dict.fromkeys((text, plain, json.dumps(text)[1:-1])):
        part = _squeeze(spelling)
        for first in (position, 0):
            if (place := squeezed.find(part, first)) >= 0:
                return place
    return -1


def _squeeze(text: str) -> str:
    return "".join(text.split())
