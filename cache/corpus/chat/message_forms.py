"""Messages as chat templates take them: what they say, and the forms in which some want them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from carryon.cache.corpus.chat.fidelity import has_text

Message = Mapping[str, Any]
TEXT_FIELDS = ("reasoning_content", "content")
"""Fields of a message that hold text."""
OPENED_CHARS = 32
"""Of a turn that its prompt may have opened."""
_OPENING = re.compile(r"<([\w:-]+)>\s*\Z")
_CLOSED = re.compile(r"</[\w:-]+>\s*\Z")
_CLOSING = re.compile(r"</([\w:-]+)>")
"""Of reasoning: the end of a prompt that opens it, of one that closes it, and in a content."""


def says_nothing(message: Message) -> bool:
    """Tell whether a message has neither text nor tool calls."""
    texts = [value for field in TEXT_FIELDS if isinstance(value := message.get(field), str)]
    return not message.get("tool_calls") and not "".join(texts).strip()


def is_answer(message: Message) -> bool:
    """Tell whether a message is the model's."""
    return message["role"] in ("assistant", "model")


def end_of_text(message: Message, closed: str, start: int) -> int:
    """Return where the message's own text ends in `closed`, which may hold special tokens too."""
    texts = [message.get(field) for field in TEXT_FIELDS]
    own = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    places = [(closed.rfind(text, start), len(text)) for text in own]
    return max([start, *(place + length for place, length in places if place >= 0)])


def continuation(message: Message, prompt: str, closed: str, start: int) -> str:
    """Return the text that continues a prompt whose finished turn lost it; empty for others.

    Of reasoning models the prompt may open the reasoning, which the content then closes, with or
    without opening it again; and the template may cut it out of a finished turn.

    Args:
        message: of the assistant.
        prompt: the messages before it, with the generation prompt.
        closed: all through the turn.
        start: length of their common beginning.
    """
    content = message.get("content")
    if not isinstance(content, str) or message.get("tool_calls") or _CLOSED.search(prompt):
        return ""
    text, opening = content.strip(), _OPENING.search(prompt)
    if message.get("reasoning_content") or not _CLOSING.search(text):
        return ""
    name = opening.group(1) if opening else ""
    is_opened = bool(name) and f"</{name}>" in text
    is_unlike = is_opened and start < len(prompt)
    if not is_unlike and has_text(closed[max(0, start - OPENED_CHARS) :], text):
        return ""
    if is_opened and text.startswith(f"<{name}>"):
        text = text.removeprefix(f"<{name}>")
        text = text.lstrip() if prompt[-1].isspace() else text
    return text


def other_forms(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """Yield the messages with "" for a content of None, with arguments as JSON texts, with both."""
    filled = [{**message, "content": message["content"] or ""} for message in messages]
    yield filled
    for form in (messages, filled):
        yield [
            {**message, "tool_calls": [_with_json_arguments(call) for call in calls]}
            if (calls := message.get("tool_calls"))
            else message
            for message in form
        ]


def shows_python(text: str, messages: Sequence[Message]) -> bool:
    """Tell whether a rendering shows None or a dict as Python writes them."""
    said = [str(message["content"] or "") for message in messages]
    is_missing = any(message["content"] is None for message in messages)
    if is_missing and text.count("None") > sum(each.count("None") for each in said):
        return True
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    arguments = [call.get("function", call).get("arguments") for call in calls]
    return any(
        value and str(value) != json.dumps(value, ensure_ascii=False) and str(value) in text
        for value in arguments
        if isinstance(value, Mapping)
    )


def _with_json_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping):
        return call
    arguments = json.dumps(function.get("arguments"), ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
