"""Contents: what each kind of record holds, read from the fields of a row.

    kind                    fields
    messages                `messages` or `conversations`; `system`, `tools` or `functions`,
                            `chat_template_kwargs`; `loss_mask` or `weights`, one a message
    preference pair         `chosen`, `rejected`, and `prompt` unless both begin with it
    prompt and completion   `prompt`, and `completion` or `response`
    text                    `text`

Prompts, completions and answers are texts or messages; a text beside messages is a user's turn in
a prompt, else an assistant's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from carryon.cache.corpus.formats.json_values import (
    check_text,
    check_value,
    decode_json,
    describe,
    quote,
)
from carryon.cache.corpus.formats.messages import (
    TRAINED_ROLES,
    is_learned,
    looks_like_messages,
    read_messages,
    read_weight,
)
from carryon.cache.corpus.formats.tool_calls import read_tools
from carryon.cache.corpus.rows import Row
from carryon.cache.errors import InputError

_CHAT_KEYS = ("messages", "conversations", "conversation")
_SHARED_KEYS = _CHAT_KEYS[1:]
_RESERVED_KWARGS = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation"),
    *("max_length", "messages", "padding", "processor_kwargs", "return_assistant_tokens_mask"),
    *("return_dict", "return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation"),
}
"""Arguments of transformers' `apply_chat_template`, which no record may set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A conversation, in the form that chat templates read (OpenAI's)."""

    messages: Sequence[Mapping[str, Any]]
    """Each with the strings `role` and `content`, the latter None where the data have none beside
    `tool_calls`, and with the other keys of the data. Arguments of tool calls are dicts."""
    is_trained: Sequence[bool]
    """For each message whether it may be a target: an assistant turn whose weight is not 0; of
    `prompt` and `completion`, one of the completion."""
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """The record's own variables for the chat template."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """A prompt and what follows it, without a chat template."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A preference pair: two answers to one prompt."""

    chosen: Chat | Completion
    rejected: Chat | Completion


Content = Chat | Completion | Text | Pair


def kind_of(fields: Mapping[str, Any]) -> str:
    """Return the kind of record that the names of non-null fields tell; empty for none. Pure."""
    names = {name for name, value in fields.items() if value is not None}
    if names & {"messages", "conversations", "conversation"}:
        return "messages"
    if {"chosen", "rejected"} <= names:
        return "preference pair"
    if "prompt" in names and names & {"completion", "response"}:
        return "prompt and completion"
    return "text" if "text" in names else ""


def read_content(row: Row, kind: str) -> Content:
    """Return what a row of a kind, as `kind_of` names it, holds.

    Raises:
        InputError: a field is faulty; the text begins with `row.where` and the field.
    """
    if kind == "messages":
        return _read_chat(row)
    if kind == "preference pair":
        return _read_pair(row)
    if kind == "prompt and completion":
        return _read_completion(row)
    return Text(text=_read_text(row, "text"))


def _read_chat(row: Row) -> Chat:
    key = next(key for key in _CHAT_KEYS if row.fields.get(key) is not None)
    messages, is_trained = _read_list(row, key)
    for name in ("loss_mask", "weights"):
        if row.fields.get(name) is not None:
            is_trained = _read_weights(row, name, messages, is_trained)
    system = row.fields.get("system")
    if system is not None and system != "":
        if messages[0]["role"] == "system":
            raise InputError(
                f"{row.where}: system: expected none beside {key}[0], which has the role system. "
                "Fix: leave one of them out"
            )
        text = check_text(system, f"{row.where}: system")
        messages = [{"role": "system", "content": text}, *messages]
        is_trained = [False, *is_trained]
    return _make_chat(row, messages, is_trained)


def _read_completion(row: Row) -> Chat | Completion:
    key = "completion" if row.fields.get("completion") is not None else "response"
    if not any(looks_like_messages(row.fields[name]) for name in ("prompt", key)):
        return Completion(prompt=_read_text(row, "prompt"), completion=_read_text(row, key))
    prompt, _ = _read_list(row, "prompt", role="user")
    completion, is_trained = _read_list(row, key, role="assistant")
    return _make_chat(row, [*prompt, *completion], [False] * len(prompt) + is_trained)


def _read_pair(row: Row) -> Pair:
    keys = ("chosen", "rejected")
    is_chat = any(looks_like_messages(row.fields.get(key)) for key in ("prompt", *keys))
    pair = _read_chat_pair(row, keys) if is_chat else _read_text_pair(row, keys)
    if pair.chosen == pair.rejected:
        raise InputError(
            f"{row.where}: rejected: expected another answer than chosen, got the same"
        )
    return pair


def _read_chat_pair(row: Row, keys: tuple[str, str]) -> Pair:
    answers = [_read_list(row, key, role="assistant") for key in keys]
    (chosen, _), (rejected, _) = answers
    num_shared = min(_num_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    prompt: list[dict[str, Any]] = []
    if row.fields.get("prompt") is not None:
        prompt, _ = _read_list(row, "prompt", role="user")
        is_answer = [messages[0]["role"] in TRAINED_ROLES for messages, _ in answers]
        if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
            prompt = []  # both answers repeat it
        elif len(prompt) == 1 and prompt[0] in chosen[:num_shared]:
            prompt = []  # both answers repeat it behind a system message
        elif not all(is_answer):
            raise InputError(
                f"{row.where}: chosen and rejected: expected answers, or conversations that begin "
                "with prompt, got other conversations"
            )
    elif not num_shared:
        raise InputError(
            f"{row.where}: chosen and rejected: expected the same beginning, got different "
            "first messages. Fix: give prompt"
        )
    chats = [
        _make_chat(
            row,
            [*prompt, *messages],
            [False] * (len(prompt) + num_shared) + is_trained[num_shared:],
        )
        for messages, is_trained in answers
    ]
    return Pair(chosen=chats[0], rejected=chats[1])


def _read_text_pair(row: Row, keys: tuple[str, str]) -> Pair:
    chosen, rejected = (_read_text(row, key) for key in keys)
    if row.fields.get("prompt") is not None:
        prompt = _read_text(row, "prompt")
    else:
        prompt = _shared_words(chosen, rejected)
        if not prompt:
            raise InputError(
                f"{row.where}: chosen and rejected: expected the same beginning, got none. "
                "Fix: give prompt"
            )
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return Pair(
        chosen=Completion(prompt=prompt, completion=chosen),
        rejected=Completion(prompt=prompt, completion=rejected),
    )


def _shared_words(first: str, second: str) -> str:
    """Return the common beginning of two texts, without a word that it cuts in two."""
    shared = min(_num_shared(first, second), len(first) - 1, len(second) - 1)  # none gets empty
    stop = max(shared, 0)
    if not (first[stop : stop + 1].isspace() and second[stop : stop + 1].isspace()):
        while stop and not first[stop - 1].isspace():
            stop -= 1
    stop -= first[:stop].endswith(" ")  # as tokenizers join a space to the word behind it
    return first[: stop or max(shared, 0)]


def _num_shared(first: Sequence[Any], second: Sequence[Any]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def _read_list(row: Row, key: str, *, role: str = "") -> tuple[list[dict[str, Any]], list[bool]]:
    """Return the messages of a field; a text becomes one message of `role`, if there is one."""
    value = row.fields[key]
    if role and isinstance(value, str) and not looks_like_messages(value):
        message = {"role": role, "content": _read_text(row, key)}
        return [message], [role == "assistant"]
    return read_messages(
        value,
        f"{row.where}: {key}",
        drops_nulls=row.has_filled_nulls,
        is_shared=key in _SHARED_KEYS,
    )


def _read_text(row: Row, key: str) -> str:
    return check_text(row.fields[key], f"{row.where}: {key}")


def _read_weights(
    row: Row, key: str, messages: Sequence[Mapping[str, Any]], is_trained: Sequence[bool]
) -> list[bool]:
    """Return which messages are learned by a list of the record with one weight a message."""
    weights, name = row.fields[key], f"{row.where}: {key}"
    if not isinstance(weights, list | tuple) or len(weights) != len(messages):
        got = len(weights) if isinstance(weights, list | tuple) else describe(weights)
        raise InputError(
            f"{name}: expected a list with a weight for each of {len(messages)} messages, got {got}"
        )
    return [
        is_learned(read_weight(weight, f"{name}[{index}]"), message["role"], f"{name}[{index}]")
        and was_trained
        for index, (weight, message, was_trained) in enumerate(
            zip(weights, messages, is_trained, strict=True)
        )
    ]


def _make_chat(row: Row, messages: Sequence[Mapping[str, Any]], is_trained: Sequence[bool]) -> Chat:
    return Chat(
        messages=messages,
        is_trained=is_trained,
        tools=read_tools(row.fields, row.where, drops_nulls=row.has_filled_nulls),
        template_kwargs=_read_template_kwargs(row),
    )


def _read_template_kwargs(row: Row) -> dict[str, Any]:
    value, name = row.fields.get("chat_template_kwargs"), f"{row.where}: chat_template_kwargs"
    if value is None or value == "":
        return {}
    values = decode_json(value, name) if isinstance(value, str) else value
    if not isinstance(values, Mapping):
        raise InputError(f"{name}: expected an object, got {describe(values)}")
    drops_nulls = row.has_filled_nulls and not isinstance(value, str)
    values = dict(check_value(values, name, drops_nulls=drops_nulls))
    for key in values:
        if not key.isidentifier() or key in _RESERVED_KWARGS:
            raise InputError(
                f"{name}: expected names of variables of a chat template, got {quote(key)}"
            )
    return values
