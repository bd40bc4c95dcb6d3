"""Records: rows with checked fields, before any tokenizer sees them.

What a record holds is the matter of `contents`: of several kinds of fields in a row, the first in
the order messages, preference pair, prompt and completion, text is read. Optional fields: `id` (a
string or number), `split` (`train`, the default; `held-out`, or usual names of test and validation
data, are held out) and `split_group` (a string or number: records of one are held out together). A
null field counts as absent; other fields are ignored.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from carryon.cache.corpus.formats.contents import (
    Chat,
    Completion,
    Content,
    Pair,
    Text,
    kind_of,
    read_content,
)
from carryon.cache.corpus.formats.json_values import check_text, quote, show_name
from carryon.cache.corpus.reading.split_names import usual_split
from carryon.cache.corpus.rows import Row
from carryon.cache.errors import InputError

__all__ = [
    "MAX_ID_BYTES",
    "Chat",
    "Completion",
    "Content",
    "Pair",
    "Record",
    "Text",
    "check_id",
    "kind_of",
    "marks_held_out",
    "read_group",
    "read_record",
    "refuse_shared_texts",
]

MAX_ID_BYTES = 255
"""Longest sample id, in UTF-8 bytes."""
_MAX_GIVEN_BYTES = MAX_ID_BYTES - 32
"""Longest id of a record: a sample's may end in more, such as the number of a piece."""
_DIGEST_CHARS = 16
_LARGE_ID = 10**200
_MAX_NAMES = 20
"""Most columns that an error lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record of the data."""

    id: str
    """Given, shortened if it is long; else `Row.made_id`."""
    where: str
    """File and line or row, for error texts."""
    content: Content
    group: str
    """Given: of records that are held out together, such as those of one template or author; empty:
    of none."""
    is_held_out: bool
    num_bytes: int
    """Size in the file, for progress; of a table's row the average."""

    @property
    def half(self) -> str:
        """What decides whether it is held out, besides a mark: its group, or its id."""
        return f"\0{self.group}" if self.group else self.id


def read_record(row: Row) -> Record:
    """Return the record of a row.

    Raises:
        InputError: the row is no record, or is of another kind than `row.expected`; one line that
            begins with `row.where`.
    """
    kind = kind_of(row.fields)
    if not kind:
        names = [show_name(name) for name, value in row.fields.items() if value is not None]
        got = ", ".join(names[:_MAX_NAMES]) + ", ..." * (len(names) > _MAX_NAMES) or "nothing"
        raise InputError(
            f"{row.where}: expected messages, conversations, chosen and rejected, prompt and "
            f"completion, or text, got {got}. Fix: --column text=NAME"
        )
    if row.expected and kind != row.expected:
        raise InputError(
            f"{row.where}: expected {row.expected}, as in the rows before, got {kind}. "
            "Fix: one kind of record a file"
        )
    return Record(
        id=read_id(row),
        where=row.where,
        content=read_content(row, kind),
        group=read_group(row),
        is_held_out=row.is_held_out or _is_held_out(row),
        num_bytes=row.num_bytes,
    )


def _is_held_out(row: Row) -> bool:
    split = row.fields.get("split")
    if split is None:
        return False
    usual = usual_split(split) if isinstance(split, str) else ""
    if not usual and split != "held-out":
        raise InputError(
            f"{row.where}: split: expected train, held-out, test or validation, got "
            f"{quote(split)}. Fix: --column split=NAME reads another column"
        )
    return usual != "train"


def marks_held_out(row: Row) -> bool:
    """Tell whether a row that may be no record is marked held out, perhaps in another spelling."""
    split = row.fields.get("split")
    is_meant = isinstance(split, str) and re.search("held|test|val|dev", split, re.IGNORECASE)
    return row.is_held_out or bool(is_meant)


def read_group(row: Row) -> str:
    """Return the group of a row, empty for none.

    Raises:
        InputError: it is no string or number.
    """
    return _read_name(row, "split_group") or ""


def read_id(row: Row) -> str:
    """Return the id of a row, or the one that is made of its content.

    Raises:
        InputError: it is neither a string nor a number, too long, or no Unicode.
    """
    value = _read_name(row, "id")
    return row.made_id if value is None else check_id(value, where=f"{row.where}: id")


def _read_name(row: Row, field: str) -> str | None:
    value, name = row.fields.get(field), f"{row.where}: {field}"
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if abs(value) < _LARGE_ID else value
    elif isinstance(value, float) and isfinite(value):
        value = str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if not isinstance(value, str):
        raise InputError(f"{name}: expected a string or number, got {quote(value)}")
    return _shorten_id(check_text(value, name))


def _shorten_id(identifier: str) -> str:
    """Return an id that fits: of a longer one the beginning and a digest of the whole."""
    encoded = identifier.encode()
    if len(encoded) <= _MAX_GIVEN_BYTES:
        return identifier
    digest = hashlib.sha256(encoded).hexdigest()[:_DIGEST_CHARS]
    head = encoded[: _MAX_GIVEN_BYTES - _DIGEST_CHARS - 1].decode(errors="ignore")
    return f"{head}~{digest}"


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
    fields = {
        key: value for key, value in record.items() if key not in ("id", "split", "split_group")
    }
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
