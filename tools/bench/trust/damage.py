"""Damages to one file of a folder, as pure functions of the folder's content.

A fault gets the name of a file and the content of all files, and returns what changes, or None if
it does not apply to that file.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

Content = Mapping[str, bytes]
"""Path below the folder -> bytes."""
Changes = dict[str, bytes | None]
"""The same for the files that change; None: removed."""
Fault = Callable[[str, Content, Sequence[Content], random.Random], Changes | None]
"""Gets the name of a file, the folder, other versions of the folder, and what picks."""

_BLOCK = 64
_NUMBER = re.compile(rb'(?<![\w."#-])-?\d+(?:\.\d+)?(?![\w."])')
_UNREAD = re.compile(r"(^|/)(\.lock|writer)$")
"""Locks: their content is the id of a process, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """A fault in a file, worked out."""

    file: str
    fault: str
    changes: Changes

    def apply(self, root: Path) -> None:
        """Change the folder."""
        for name, content in self.changes.items():
            if content is None:
                (root / name).unlink()
            else:
                (root / name).write_bytes(content)


def flip_bit(name: str, folder: Content, _: Sequence[Content], picks: random.Random) -> Changes:
    """Flip one bit."""
    content = bytearray(folder[name])
    content[picks.randrange(len(content))] ^= 1 << picks.randrange(8)
    return {name: bytes(content)}


def zero_block(name: str, folder: Content, _: Sequence[Content], picks: random.Random) -> Changes:
    """Write zeros over a block."""
    content = bytearray(folder[name])
    first = picks.randrange(len(content))
    count = min(_BLOCK, len(content) - first)
    content[first : first + count] = bytes(count)
    return {name: bytes(content)}


def cut_end(name: str, folder: Content, _: Sequence[Content], picks: random.Random) -> Changes:
    """Cut off the end, of one byte up to all."""
    return {name: folder[name][: picks.randrange(len(folder[name]))]}


def append_bytes(name: str, folder: Content, _: Sequence[Content], picks: random.Random) -> Changes:
    """Append bytes."""
    return {name: folder[name] + picks.randbytes(picks.randrange(1, _BLOCK))}


def remove(name: str, _: Content, __: Sequence[Content], ___: random.Random) -> Changes:
    """Remove the file."""
    return {name: None}


def replace_by_namesake(
    name: str, folder: Content, _: Sequence[Content], picks: random.Random
) -> Changes | None:
    """Replace by a file of the same name elsewhere in the folder, such as of an older step."""
    others = _namesakes(name, folder)
    return {name: folder[picks.choice(others)]} if others and not _is_plot(name) else None


def replace_by_version(
    name: str, folder: Content, versions: Sequence[Content], picks: random.Random
) -> Changes | None:
    """Replace by the same file of another run, store or lineage."""
    others = [each[name] for each in versions if each.get(name, folder[name]) != folder[name]]
    return {name: picks.choice(others)} if others and not _is_plot(name) else None


def swap(name: str, folder: Content, _: Sequence[Content], picks: random.Random) -> Changes | None:
    """Swap with a file of the same kind or name."""
    alike = [
        other
        for other in folder
        if kind_of(other) == kind_of(name) and folder[other] != folder[name]
    ]
    others = alike or _namesakes(name, folder)
    if not others or _is_plot(name):
        return None
    other = picks.choice(others)
    return {name: folder[other], other: folder[name]}


def edit_number(
    name: str, folder: Content, _: Sequence[Content], picks: random.Random
) -> Changes | None:
    """Change the last digit of a number in a document."""
    content = folder[name]
    numbers = list(_NUMBER.finditer(content)) if name.endswith((".json", ".jsonl", ".yaml")) else []
    if not numbers:
        return None
    last = picks.choice(numbers).end() - 1
    digit = b"%d" % ((content[last] - ord("0") + 1) % 10)
    return {name: content[:last] + digit + content[last + 1 :]}


def duplicate_line(
    name: str, folder: Content, _: Sequence[Content], picks: random.Random
) -> Changes | None:
    """Write a line of a .jsonl twice."""
    return _with_line(2, name, folder, picks)


def drop_line(
    name: str, folder: Content, _: Sequence[Content], picks: random.Random
) -> Changes | None:
    """Drop a line of a .jsonl."""
    return _with_line(0, name, folder, picks)


def _with_line(times: int, name: str, folder: Content, picks: random.Random) -> Changes | None:
    """Write one line of a .jsonl `times` times."""
    lines = folder[name].splitlines(keepends=True)
    if not name.endswith(".jsonl") or not lines:
        return None
    number = picks.randrange(len(lines))
    return {name: b"".join([*lines[:number], *times * [lines[number]], *lines[number + 1 :]])}


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        flip_bit,
        replace_by_version,
        edit_number,
        remove,
        replace_by_namesake,
        cut_end,
        swap,
        drop_line,
        append_bytes,
        duplicate_line,
        zero_block,
    )
}


def read_folder(root: Path) -> dict[str, bytes]:
    """Return the content of each file below a folder that a fault may change."""
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*"))}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if path.is_file() and not _UNREAD.search(name)
    }


def kind_of(name: str) -> str:
    """Return the kind of a file: its path with every number replaced."""
    return re.sub(r"\d+", "0", name)


def plan_damages(
    folder: Content, versions: Sequence[Content], *, trials: int, seed: int
) -> list[Damage]:
    """Return damages in turn to each kind of file, and to each kind every fault in turn."""
    picks = random.Random(seed)
    kinds: dict[str, list[str]] = {}
    for name in sorted(folder):
        kinds.setdefault(kind_of(name), []).append(name)
    order = list(kinds)
    picks.shuffle(order)
    turns = {kind: _faults_from(number) for number, kind in enumerate(order)}
    damages: list[Damage] = []
    while len(damages) < trials:
        for kind in order[: trials - len(damages)]:
            damages.append(_damage(picks.choice(kinds[kind]), turns[kind], folder, versions, picks))
    return damages


def _damage(
    name: str,
    faults: Iterator[str],
    folder: Content,
    versions: Sequence[Content],
    picks: random.Random,
) -> Damage:
    while True:
        fault = next(faults)
        if not folder[name] and fault not in ("remove", "append_bytes"):
            continue
        changes = FAULTS[fault](name, folder, versions, picks)
        if changes and any(content != folder[each] for each, content in changes.items()):
            return Damage(file=name, fault=fault, changes=changes)


def _faults_from(number: int) -> Iterator[str]:
    names = list(FAULTS)
    while True:
        yield names[number % len(names)]
        number += 1


def _namesakes(name: str, folder: Content) -> list[str]:
    base = PurePosixPath(name).name
    return [
        other
        for other in folder
        if PurePosixPath(other).name == base and folder[other] != folder[name]
    ]


def _is_plot(name: str) -> bool:
    """Tell whether a file is a picture: that of another run is as sound, and none is read."""
    return name.endswith(".png")
