"""A record: what the user wrote, before any tokenizer sees it.

A record has `messages`, or `prompt` and `completion`, or `text`; where it has several of these the
first in this order counts. Optional fields: `id` (a string or whole number) and `split` (`train`,
the default, or `held-out`). Fields that are null count as absent, all others are passed over.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carryon.cache.corpus.files import Row, read_rows
from carryon.cache.errors import InputError

MAX_ID_BYTES = 255
"""Longest sample id, in UTF-8 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Messages:
    """A conversation."""

    messages: list[dict[str, Any]]
    """Each with `role` and `content`, both strings; other keys go to the chat template too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCompletion:
    """A prompt and what should follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """A document."""

    text: str


Content = Messages | PromptCompletion | Text


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record of a file."""

    id: str
    """Unique among all records; made from file stem and line where the record has none."""
    where: str
    """File and line or row, for error texts."""
    content: Content
    is_held_out: bool
    num_bytes: int
    """Size in the file, for progress; of a Parquet row the average."""


def read_records(files: Sequence[Path]) -> Iterator[Record]:
    """Yield the records of `files`, in order.

    Raises:
        InputError: a line or row is not a record, or two records have one id; the text names the
            file and the line or row.
        MissingExtraError: a Parquet file, and pyarrow is not installed.
    """
    taken: dict[str, str] = {}  # id -> where it was first seen
    for path in files:
        for row in read_rows(path):
            identifier = _given_id(row)
            if identifier is None:
                identifier = _made_id(path.stem, row.number, taken)
            elif identifier in taken:
                raise InputError(
                    f"{row.where}: id {identifier!r} is already that of {taken[identifier]}: "
                    "give each record an id of its own, or none"
                )
            taken[identifier] = row.where
            yield Record(
                id=identifier,
                where=row.where,
                content=_content(row),
                is_held_out=_is_held_out(row),
                num_bytes=row.num_bytes,
            )


def _content(row: Row) -> Content:
    found = [name for name, value in row.fields.items() if value is not None]
    if "messages" in found:
        return Messages(messages=_messages(row))
    if "prompt" in found and "completion" in found:
        return PromptCompletion(
            prompt=_string(row, "prompt"), completion=_string(row, "completion")
        )
    if "text" in found:
        return Text(text=_string(row, "text"))
    raise InputError(
        f"{row.where}: expected messages, prompt and completion, or text, "
        f"found {', '.join(found) or 'nothing'}"
    )


def _string(row: Row, name: str) -> str:
    value = row.fields[name]
    if not isinstance(value, str):
        raise InputError(f"{row.where}: {name}: expected a string, got {type(value).__name__}")
    return value


def _messages(row: Row) -> list[dict[str, Any]]:
    values = row.fields["messages"]
    if not isinstance(values, list) or not values:
        found = "an empty list" if values == [] else type(values).__name__
        raise InputError(f"{row.where}: messages: expected a list of messages, got {found}")
    messages = []
    for index, value in enumerate(values):
        name = f"{row.where}: messages[{index}]"
        if not isinstance(value, dict):
            raise InputError(f"{name}: expected role and content, got {type(value).__name__}")
        for key in ("role", "content"):
            if not isinstance(value.get(key), str):
                found = type(value[key]).__name__ if key in value else "none"
                raise InputError(f"{name}: {key}: expected a string, got {found}")
        # Parquet fills in every key that any row has
        messages.append({key: item for key, item in value.items() if item is not None})
    return messages


def _is_held_out(row: Row) -> bool:
    split = row.fields.get("split")
    if split not in (None, "train", "held-out"):
        raise InputError(f"{row.where}: split: expected 'train' or 'held-out', got {split!r}")
    return split == "held-out"


def _given_id(row: Row) -> str | None:
    value = row.fields.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InputError(
            f"{row.where}: id: expected a string or whole number, got {type(value).__name__}"
        )
    problem = id_problem(str(value))
    if problem:
        raise InputError(f"{row.where}: id: {problem}")
    return str(value)


def id_problem(identifier: str) -> str | None:
    """Return what is wrong with a sample id, or None if it can be stored."""
    try:
        num_bytes = len(identifier.encode())
    except UnicodeEncodeError:
        return f"expected valid Unicode, got {identifier!a}"
    if not 1 <= num_bytes <= MAX_ID_BYTES:
        return f"expected 1 to {MAX_ID_BYTES} bytes, got {num_bytes}"
    if "\0" in identifier:
        return f"expected no NUL character, got {identifier!a}"
    return None


def _made_id(stem: str, number: int | None, taken: Mapping[str, str]) -> str:
    # stem, stem-7, and for a second file of that name stem~2, stem-7~2
    short = stem.encode(errors="replace")[: MAX_ID_BYTES - 40].decode(errors="ignore")
    name = short if number is None else f"{short}-{number}"
    made, attempt = name, 1
    while made in taken:
        attempt += 1
        made = f"{name}~{attempt}"
    return made
