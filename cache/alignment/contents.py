"""Where the texts of a conversation stand in its rendering, found with marks in their place.

The same conversation is rendered with words that stand nowhere else; what lies between them is
the template's. Texts are what messages say: reasoning, content, names and arguments of tool calls.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from carryon.cache.alignment.known_text import Span
from carryon.cache.corpus.records import Chat

_FIELDS = ("reasoning_content", "content")
_MARK = re.compile(r'"?(qz[0-9]+kv)"?')


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkedChat:
    """A conversation with marks for texts."""

    chat: Chat
    texts: Mapping[str, str]
    """The text of each mark."""
    quoted: frozenset[str]
    """Marks for JSON, whose quotes belong to them."""
    answers: frozenset[str]
    """Marks in what the assistant says."""


def mark_chat(chat: Chat, *, whole_arguments: bool, with_blanks: bool) -> MarkedChat:
    """Return a conversation with a mark for each text that is not empty. Pure.

    Args:
        chat: the conversation.
        whole_arguments: mark the arguments of a tool call as one JSON text, which not every
            template can write; else each text in them.
        with_blanks: mark contents of white space alone too, which not every template writes.
    """
    numbers, texts, quoted = count(), dict[str, str](), set[str]()

    def mark(text: str, *, with_blanks: bool = False) -> str:
        if not (text if with_blanks else text.strip()):
            return text
        name = f"qz{next(numbers)}kv"
        texts[name] = text
        return name

    def mark_leaves(value: Any) -> Any:  # noqa: ANN401 -- JSON
        if isinstance(value, Mapping):
            return {key: mark_leaves(item) for key, item in value.items()}
        if isinstance(value, list):
            return [mark_leaves(item) for item in value]
        return mark(value) if isinstance(value, str) else value

    def mark_call(call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call.get("function")
        if not isinstance(function, Mapping):
            return call
        marked = {**function, "name": mark(str(function.get("name", "")))}
        arguments = function.get("arguments")
        if whole_arguments and isinstance(arguments, Mapping) and arguments:
            name = mark(json.dumps(arguments, ensure_ascii=False))
            quoted.add(name)
            marked["arguments"] = name
        elif "arguments" in function:
            marked["arguments"] = mark_leaves(arguments)
        return {**call, "function": marked}

    messages, answers = [], set[str]()
    for message in chat.messages:
        marked, num_before = dict(message), len(texts)
        for field in _FIELDS:
            if isinstance(text := message.get(field), str):
                marked[field] = mark(text, with_blanks=with_blanks)
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [mark_call(call) for call in calls]
        messages.append(marked)
        if message.get("role") == "assistant":
            answers.update(list(texts)[num_before:])
    return MarkedChat(
        chat=replace(chat, messages=messages),
        texts=texts,
        quoted=frozenset(quoted),
        answers=frozenset(answers),
    )


def locate(marked: str, text: str, marks: MarkedChat) -> dict[str, Span] | None:
    """Return (start, stop) of each marked text in a rendering, in order; None if it is another.

    Args:
        marked: rendering of the conversation with marks.
        text: rendering of the conversation.
        marks: the texts.
    """
    parts, names = _split(marked, marks)
    if not text.startswith(parts[0]):
        return None
    at, places = len(parts[0]), dict[str, Span]()
    for number, (name, part) in enumerate(zip(names, parts[1:], strict=True), start=1):
        for spelling in _spellings(marks.texts[name]):
            end = at + len(spelling)
            if not text.startswith(spelling, at):
                continue
            # one may end with the stop token, the other with a newline behind it
            is_end = number == len(names) and _begin_alike(part, text[end:])
            if is_end or (number < len(names) and text.startswith(part, end)):
                places.setdefault(name, (at, end))
                at = end + len(part)
                break
        else:
            return None
    return places


def common_places(
    own: Mapping[str, Span],
    other: Mapping[str, Span],
    own_text: str,
    other_text: str,
    *,
    trimmed: Collection[str],
) -> tuple[list[Span], list[Span]] | None:
    """Return the places of texts that stand in both renderings; None if in another order.

    Where one template trims white space of a text in `trimmed`, it is left out of both places.
    """
    names = [name for name in own if name in other]
    if names != [name for name in other if name in own]:
        return None
    firsts, seconds = [], []
    for name in names:
        first, second = own[name], other[name]
        if name in trimmed and own_text[slice(*first)] != other_text[slice(*second)]:
            first, second = _trim(own_text, first), _trim(other_text, second)
        firsts.append(first)
        seconds.append(second)
    return firsts, seconds


def with_own_blanks(
    own_text: str,
    own: Sequence[Span],
    other_text: str,
    other: Sequence[Span],
    cuts: Sequence[int],
) -> tuple[str, list[Span], tuple[int, ...]]:
    """Return the other rendering with the white space at the ends of contents as in the own one.

    One template may trim what an assistant says where the other does not. Left as it is, what the
    other base knows at a blank would tell whether the answer goes on behind it.

    Args:
        own_text: whose contents are written as they are.
        own: the place of each content in it.
        other_text: that is changed.
        other: the places in it.
        cuts: characters of it, within no content.

    Returns:
        The text, the places and the cuts.
    """
    parts, places, moved, at, shift = list[str](), list[Span](), list(cuts), 0, 0
    for (start, stop), (first, last) in zip(own, other, strict=True):
        content, written = own_text[start:stop], other_text[first:last]
        if content.strip() != written.strip():
            content = written
        parts += [other_text[at:first], content]
        at, begin = last, first + shift
        places.append((begin, begin + len(content)))
        shift += len(content) - len(written)
        moved = [new if cut <= first else cut + shift for cut, new in zip(cuts, moved, strict=True)]
    return "".join([*parts, other_text[at:]]), places, tuple(moved)


def _begin_alike(first: str, second: str) -> bool:
    return first.startswith(second) or second.startswith(first)


def _trim(text: str, place: Span) -> Span:
    part = text[slice(*place)]
    start = place[0] + len(part) - len(part.lstrip())
    return start, start + len(part.strip())


def _split(marked: str, marks: MarkedChat) -> tuple[list[str], list[str]]:
    """Return the parts between marks, and the marks."""
    parts, names, at = [], [], 0
    for found in _MARK.finditer(marked):
        name = found[1]
        if name not in marks.texts:
            continue
        start, stop = found.span() if name in marks.quoted else found.span(1)
        parts.append(marked[at:start])
        names.append(name)
        at = stop
    return [*parts, marked[at:]], names


def _spellings(text: str) -> Sequence[str]:
    """Return how a template may write a text, the longest first."""
    plain = [text, text.rstrip(), text.lstrip(), text.strip()]
    escaped = [
        json.dumps(each, ensure_ascii=is_ascii)[1:-1]
        for each in plain
        for is_ascii in (False, True)
    ]
    return sorted(dict.fromkeys([*plain, *escaped]), key=len, reverse=True)
