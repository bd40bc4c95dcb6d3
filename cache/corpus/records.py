"""Records: rows with checked fields, before any tokenizer sees them.

    kind                    fields
    messages                `messages` or `conversations`, `tools`, `chat_template_kwargs`
    preference pair         `chosen`, `rejected`, and `prompt` unless both begin with it
    prompt and completion   `prompt`, and `completion` or `response`
    text                    `text`

Of several kinds in a row, the first in this order is read. Optional fields: `id` (a string or
number) and `split` (`train`, the default, or `held-out`). A null field counts as absent; other
fields are ignored.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from carryon.cache.corpus.rows import Row
from carryon.cache.errors import InputError

MAX_ID_BYTES = 255
"""Longest sample id, in UTF-8 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A conversation, in the form that chat templates read (OpenAI's)."""

    messages: Sequence[Mapping[str, Any]]
    """Each with the string `role`; with `content`, a string, absent where the data have none
    beside `tool_calls`; and with the other keys of the data. Arguments of tool calls are dicts."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record of the data."""

    id: str
    """Given, shortened if it is long; else `Row.made_id`."""
    where: str
    """File and line or row, for error texts."""
    content: Content
    is_held_out: bool
    num_bytes: int
    """Size in the file, for progress; of a table's row the average."""


def read_record(row: Row) -> Record:
    """Return the record of a row.

    Raises:
        InputError: the row is no record, or is of another kind than `row.expected`; one line that
            begins with `row.where`.
    """
    raise NotImplementedError


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


def refuse_shared_texts(
    train: Iterable[Mapping[str, Any]], held_out: Iterable[Mapping[str, Any]]
) -> None:
    """Check that no held-out record repeats a training record; ids and splits are not compared.

    Raises:
        InputError: some do; the text has their number and the first one.
    """
    known = {_text_key(record) for record in train}
    shared = [record for record in held_out if _text_key(record) in known]
    if shared:
        name = shared[0].get("id", _text_key(shared[0])[:60])
        raise InputError(
            f"held-out records: expected other texts than in training, got {len(shared)} that are "
            f"equal, the first is {name}. Fix: draw them with a seed far from the training seed"
        )


def _text_key(record: Mapping[str, Any]) -> str:
    fields = {key: value for key, value in record.items() if key not in ("id", "split")}
    return json.dumps(fields, sort_keys=True)


def check_id(identifier: str, *, where: str) -> str:
    """Return a sample id that can be stored.

    Raises:
        InputError: it is too long, not valid Unicode or contains a NUL character.
    """
    try:
        num_bytes = len(identifier.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: expected valid Unicode, got {identifier!a}") from error
    if not 1 <= num_bytes <= MAX_ID_BYTES:
        raise InputError(f"{where}: expected 1 to {MAX_ID_BYTES} bytes, got {num_bytes}")
    if "\0" in identifier:
        raise InputError(f"{where}: expected no NUL character, got {identifier!a}")
    return identifier
