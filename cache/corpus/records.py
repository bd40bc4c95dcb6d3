"""Records: rows with checked fields, before any tokenizer sees them.

A record has `messages`, or `prompt` and `completion`, or `text`; of several, the first in this
order is read. Optional fields: `id` (a string or whole number) and `split` (`train`, the default,
or `held-out`). A null field counts as absent; other fields are ignored.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from carryon.cache.corpus.files import Row
from carryon.cache.errors import InputError

MAX_ID_BYTES = 255
"""Longest sample id, in UTF-8 bytes."""


Content = list[dict[str, Any]] | tuple[str, str] | str
"""Messages, each with the strings `role` and `content` and what else the chat template reads; or
prompt and completion; or a text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record of the data."""

    id: str
    """Unique among all records; made from file stem and line where the record has none."""
    where: str
    """File and line or row, for error texts."""
    content: Content
    is_held_out: bool
    num_bytes: int
    """Size in the file, for progress; of a Parquet row the average."""


def read_records(rows: Iterable[Row]) -> Iterator[Record]:
    """Yield the records of `rows`, in order.

    Raises:
        InputError: a row is not a record, or two records have one id; the text names the origin
            of the row.
    """
    taken: dict[str, str] = {}  # id -> origin of its first row
    for row in rows:
        identifier = _given_id(row)
        if identifier is None:
            identifier = _made_id(row.stem, row.number, taken)
        elif identifier in taken:
            raise InputError(
                f"{row.where}: id: expected a different one for each record, got {identifier!r}, "
                f"which is also that of {taken[identifier]}. Fix: change it, or leave out all ids"
            )
        taken[identifier] = row.where
        yield Record(
            id=identifier,
            where=row.where,
            content=_content(row),
            is_held_out=_is_held_out(row),
            num_bytes=row.num_bytes,
        )


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


def _content(row: Row) -> Content:
    names = [name for name, value in row.fields.items() if value is not None]
    if "messages" in names:
        return _messages(row)
    if "prompt" in names and "completion" in names:
        return _string(row, "prompt"), _string(row, "completion")
    if "text" in names:
        return _string(row, "text")
    raise InputError(
        f"{row.where}: expected messages, prompt and completion, or text, "
        f"got {', '.join(names) or 'nothing'}"
    )


def _string(row: Row, name: str) -> str:
    value = row.fields[name]
    if not isinstance(value, str):
        raise InputError(f"{row.where}: {name}: expected a string, got {type(value).__name__}")
    return value


def _messages(row: Row) -> list[dict[str, Any]]:
    values = row.fields["messages"]
    if not isinstance(values, list) or not values:
        got = "an empty list" if values == [] else type(values).__name__
        raise InputError(f"{row.where}: messages: expected a list of messages, got {got}")
    messages = []
    for index, value in enumerate(values):
        name = f"{row.where}: messages[{index}]"
        if not isinstance(value, dict):
            raise InputError(f"{name}: expected role and content, got {type(value).__name__}")
        for key in ("role", "content"):
            if not isinstance(value.get(key), str):
                got = type(value[key]).__name__ if key in value else "none"
                raise InputError(f"{name}: {key}: expected a string, got {got}")
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
    return check_id(str(value), where=f"{row.where}: id")


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


def _made_id(stem: str, number: int | None, taken: Mapping[str, str]) -> str:
    # stem, stem-7, and for a second file of that name stem~2, stem-7~2
    short = stem.encode(errors="replace")[: MAX_ID_BYTES - 40].decode(errors="ignore")
    name = short if number is None else f"{short}-{number}"
    made, attempt = name, 1
    while made in taken:
        attempt += 1
        made = f"{name}~{attempt}"
    return made
