"""Documents and files as a stranger would change them: values, names, nesting, bytes, links.

Every change is drawn from a seeded generator, so a document is named by its number.
"""

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

VALUES: list[Any] = [
    *(0, -1, 1, 7, 64, 65, 10**6, 1 << 24, 1 << 31, 10**12, 1 << 63, 1 << 70, 10**400),
    *(None, True, False, 0.5, -0.5, 1e300, 1e12, float("nan"), float("inf"), -float("inf")),
    *("", "x", "0" * 64, "a\0b", "a\nb", "64", "x" * 1_000_000, "\ud800", "\u202etxt.exe"),
    *("\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "\r\x1b[1A\x1b[2Kcarryon: sound", "\b\b\b"),
    *("/dev/zero", "../canary", "../../canary", "/etc/passwd", "CANARY", "~", "-", "."),
    *("final", "layer.2", "bfloat16", "object", "near", "bottleneck", "https://host.invalid/x"),
    *([], {}, [0], [10**12], ["final"], {"a": 1}, [[]] * 3, {"x": {"y": []}}, [None] * 100_000),
]
"""CANARY stands for the path of a file of the user."""
_KEYS = ["x", "", "a\0b", "\x1b[31mred", "../canary", "__class__", "0", "k" * 100_000]
_DIGESTS = 0.1
_DEEP = 100_000
Harm = Callable[[bytes, random.Random], bytes]


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:  # noqa: ANN401
    """Yield (container, key) of everything in a document."""
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    for key in keys:
        yield value, key
        yield from places_in(value[key])


def is_digest(container: Any, key: Any) -> bool:  # noqa: ANN401
    """Tell whether this is a digest, or a list of one."""
    value = container[key]
    text = value[0] if isinstance(value, list) and len(value) == 1 else value
    return isinstance(text, str) and len(text) in (8, 64)


def mutate(values: dict[str, Any], changes: list[tuple[float, str, Any]]) -> None:
    """Change values, names and lengths of a document."""
    for where, kind, value in changes:
        places = list(places_in(values))
        few = [place for place in places if not is_digest(*place)]
        places = few if where > _DIGESTS else places  # most of a document are digests
        if not places:
            return
        container, key = places[int(where * len(places))]
        if kind == "set":
            container[key] = copy.deepcopy(value)
        elif kind == "drop":
            del container[key]
        elif isinstance(container, list):
            container.append(copy.deepcopy(value))
        elif kind == "rename":
            container[str(value)] = container.pop(key)
        else:
            container[str(value)] = copy.deepcopy(container[key])


def change_values(values: Any, picks: random.Random) -> str:  # noqa: ANN401
    """Change one to three values of a document in place; return what was done."""
    changes = [
        (
            picks.random(),
            picks.choice(["set", "set", "set", "drop", "rename", "add"]),
            picks.choice(VALUES),
        )
        for _ in range(picks.choice([1, 1, 1, 2, 3]))
    ]
    mutate(values, changes)
    return "; ".join(f"{kind} {value!a:.40} at {where:.3f}" for where, kind, value in changes)


def change_content(content: bytes, form: str, picks: random.Random) -> tuple[bytes, str]:
    """Return the content of a file with one change, and what it is.

    Args:
        content: of the file.
        form: `json`, `jsonl`, `yaml`, `safetensors` or `text`.
        picks: draws the change.
    """
    if picks.random() < _SHARE_OF_VALUES and form in _CHANGED_VALUES:
        return _CHANGED_VALUES[form](content, picks)
    name = picks.choice(list(_HARMS))
    return _HARMS[name](content, picks), name


def change_entry(
    path: Path, picks: random.Random, *, canary: Path, without: Collection[str]
) -> str:
    """Put something else into the place of a file; return what.

    Args:
        path: of the file.
        picks: draws the change.
        canary: a file of the user.
        without: entries that are none of a stranger's making there.
    """
    name = picks.choice([name for name in _ENTRIES if name not in without])
    path.unlink()
    _ENTRIES[name](path, canary)
    return name


def _change_json(content: bytes, picks: random.Random) -> tuple[bytes, str]:
    values = json.loads(content)
    name = change_values(values, picks)
    return json.dumps(values).encode(), name


def _change_lines(content: bytes, picks: random.Random) -> tuple[bytes, str]:
    lines = content.splitlines()
    place = picks.randrange(len(lines))
    harm = picks.choice([_change_json, _change_json, _harm_line])
    lines[place], name = harm(lines[place], picks)
    return b"\n".join([*lines, b""]), f"line {place + 1}: {name}"


def _harm_line(content: bytes, picks: random.Random) -> tuple[bytes, str]:
    name = picks.choice(list(_HARMS))
    return _HARMS[name](content, picks), name


def _change_yaml(content: bytes, picks: random.Random) -> tuple[bytes, str]:
    values = yaml.safe_load(content)
    name = change_values(values, picks)
    return yaml.safe_dump(values).encode("utf-8", "replace"), name


def _change_header(content: bytes, picks: random.Random) -> tuple[bytes, str]:
    length = int.from_bytes(content[:8], "little")
    header, name = _change_json(content[8 : 8 + length], picks)
    size = picks.choice([len(header)] * 4 + [0, length + 1, 1 << 40, (1 << 64) - 1])
    return size.to_bytes(8, "little") + header + content[8 + length :], f"header of {size}: {name}"


def _change_text(content: bytes, picks: random.Random) -> tuple[bytes, str]:
    text = picks.choice(_TEXTS)
    place = picks.randrange(len(content) + 1)
    return content[:place] + text + content[place:], f"{text!a:.60} at byte {place}"


def _flip(content: bytes, picks: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    for _ in range(picks.choice([1, 1, 4, 64])):
        changed[picks.randrange(len(changed))] = picks.randrange(256)
    return bytes(changed)


def _double_key(content: bytes, picks: random.Random) -> bytes:
    """Put an object's first key before it once more, with another value."""
    key = content[content.find(b'"') :].partition(b":")[0] or b'"a"'
    value = json.dumps(picks.choice(VALUES[:40])).encode()
    return content.replace(b"{", b"{" + key + b":" + value + b",", 1)


_SHARE_OF_VALUES = 0.7
_CHANGED_VALUES: dict[str, Callable[[bytes, random.Random], tuple[bytes, str]]] = {
    "json": _change_json,
    "jsonl": _change_lines,
    "yaml": _change_yaml,
    "safetensors": _change_header,
    "text": _change_text,
}
_TEXTS = [
    *(b"\x1b[31mred\x1b[0m", b"\x1b]0;title\x07", b"\x9b2J", b"\r", b"\0", b"\xff\xfe", b"[" * 500),
    *(b"{{ 'x' * 10**10 }}", b"{% for i in range(10**12) %}x{% endfor %}", b"{{ ''.__class__ }}"),
    *(b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", b"{{ x"),
    *(
        b"{% include '/etc/passwd' %}",
        b"{{ raise_exception('\x1b[31mred\nline') }}",
        b"---\n&a [*a]",
    ),
]
_HARMS: dict[str, Harm] = {
    "bytes changed": _flip,
    "cut off": lambda content, picks: content[: picks.randrange(len(content) or 1)],
    "doubled": lambda content, _: content + content,
    "a key twice": _double_key,
    "no UTF-8": lambda content, picks: _flip(content, picks).replace(b"e", b"\xff\xfe"),
    "empty": lambda content, picks: b"",
    "zeros": lambda content, _: bytes(len(content)),
    "UTF-16": lambda content, _: content.decode("latin-1").encode("utf-16"),
    "BOM": lambda content, _: b"\xef\xbb\xbf" + content,
    "lists, deep": lambda content, _: b"[" * _DEEP + b"]" * _DEEP,
    "objects, deep": lambda content, _: b'{"a":' * _DEEP + b"1" + b"}" * _DEEP,
    "a value deep": lambda content, _: _first_value(content, b"[" * _DEEP + b"]" * _DEEP),
    "a value 900 deep": lambda content, _: _first_value(content, b"[" * 900 + b"]" * 900),
    "a number of a million digits": lambda content, _: _first_value(content, b"9" * 1_000_000),
    "a number": lambda content, picks: b"12",
    "NaN": lambda content, _: _first_value(content, b"NaN"),
}
HUGE = "a file of 1 TB"
LINKED = "a folder behind a link"
_ENTRIES: dict[str, Callable[[Path, Path], object]] = {
    "a link to a file of the user": lambda path, canary: path.symlink_to(canary),
    "a link to /dev/zero": lambda path, _: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path, _: path.symlink_to(path.name),
    "a named pipe": lambda path, _: os.mkfifo(path),
    "a folder": lambda path, _: path.mkdir(),
    HUGE: lambda path, _: _sparse(path, 1 << 40),
    "a file of 200 MB": lambda path, _: _sparse(path, 200 << 20),
    LINKED: lambda path, canary: _link_folder(path.parent, canary),
}


def _first_value(content: bytes, value: bytes) -> bytes:
    """Replace the first value of an object."""
    head, colon, rest = content.partition(b":")
    return head + colon + value + rest[rest.find(b",") :] if colon else value


def _sparse(path: Path, size: int) -> None:
    path.touch()
    os.truncate(path, size)


def _link_folder(folder: Path, canary: Path) -> None:
    target = canary.parent / "elsewhere"
    shutil.move(folder, target)
    folder.symlink_to(target)
