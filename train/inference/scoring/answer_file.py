"""Answers on disk: a line of JSON each, appended batch by batch, so that an interrupt loses none.

The first line holds the settings that decide the answers. Verdicts are written too, but never read:
another rule judges the same answers without generating them again.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError
from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import parse_json
from carryon.cache.files.full_disk import disk_full_named
from carryon.train.inference.scoring.problems import Problem

MAX_FILE_BYTES = 1 << 32
MAX_LINE_BYTES = 1 << 24
_FORMAT = 1

Key = tuple[str, str, str, int]
"""Task, arm, problem and sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An answer of an arm to a problem."""

    task: str
    arm: str
    model: str
    """Digest of the arm's model."""
    id: str
    """Of the problem."""
    sample: int
    """Number of the answer, from 0, of several to one problem."""
    question: str
    right: str
    text: str
    is_right: bool
    tokens: int
    is_cut: bool
    """Whether the limit of new tokens ended it."""
    seconds: float
    """Share of its batch's time."""
    prompt: str = ""
    """Digest of the messages that posed the problem; empty in files of older versions."""

    @property
    def key(self) -> Key:
        """What the answer is to, and from whom."""
        return self.task, self.arm, self.id, self.sample


_TYPES = {item.name: item.type for item in fields(Answer)}
_MAX_COUNT = 1 << 40
"""Of tokens and seconds: more is no measurement, and sums stay finite."""


class AnswerFile:
    """Answers of one set of settings, in a file that grows."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open a file, or make a new one; a last line that was cut off is removed.

        Raises:
            InputError: it holds something else, or answers made with other settings.
        """
        self.path, self.answers = path, dict[Key, Answer]()
        self._settings = dict(settings)
        if path.is_dir():
            raise InputError(f"out: expected a file for answers, got the folder {path}")
        if not path.exists() or not path.stat().st_size:
            return
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: expected answers, got {path.stat().st_size:,} bytes")
        whole = 0
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                if not line.endswith(b"\n"):
                    self._check_cut(line, number)
                    break
                self._take(line, number)
                whole += len(line)
        if whole < path.stat().st_size:
            os.truncate(path, whole)

    def answers_to(
        self, arm: str, posed: Iterable[tuple[str, Problem]], digests: Iterable[str]
    ) -> set[tuple[str, str, int]]:
        """Return task, problem and sample of the answers of an arm to prompts as they are now.

        `digests` are those of the prompts that pose the problems.
        """
        asked = {
            (task, problem.id): (problem.question, ("", digest))
            for (task, problem), digest in zip(posed, digests, strict=True)
        }
        known = set[tuple[str, str, int]]()
        for answer in self.answers.values():
            question, prompts = asked.get((answer.task, answer.id), (None, ()))
            if answer.arm == arm and answer.question == question and answer.prompt in prompts:
                known.add((answer.task, answer.id, answer.sample))
        return known

    def append(self, answers: Iterable[Answer]) -> None:
        """Write answers to the disk at once.

        Raises:
            DiskFullError: no space left; answers written before are kept.
        """
        added = list(answers)
        lines = [json.dumps(asdict(answer)) + "\n" for answer in added]
        with disk_full_named(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                if not file.tell():
                    lines.insert(0, self._head())
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
        self.answers |= {answer.key: answer for answer in added}

    def replace(self, answers: Iterable[Answer]) -> None:
        """Write answers whose verdicts have changed; the file is replaced atomically."""
        changed = {answer.key: answer for answer in answers}
        if any(self.answers[key] != answer for key, answer in changed.items()):
            self.answers |= changed
            lines = [json.dumps(asdict(answer)) + "\n" for answer in self.answers.values()]
            write_file(self.path, "".join([self._head(), *lines]).encode())

    def _head(self) -> str:
        return json.dumps({"format": _FORMAT, "settings": self._settings}) + "\n"

    def _check_cut(self, line: bytes, number: int) -> None:
        """Refuse a line without an end that is no last line of this file, cut off.

        Raises:
            InputError: it is longer than any answer, or the file is of something else.
        """
        is_ours = number > 1 or self._head().encode().startswith(line)
        if len(line) >= MAX_LINE_BYTES or not is_ours:
            raise InputError(f"{self.path}:{number}: expected an answer. Fix: another --out")

    def _take(self, line: bytes, number: int) -> None:
        try:
            values = parse_json(line)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise InputError(f"{self.path}:{number}: expected an answer. Fix: another --out")
        if number == 1:
            self._compare(values)
            return
        values = {"prompt": "", **values}
        if values.keys() != _TYPES.keys() or not all(map(_is_sound, values.items())):
            raise InputError(f"{self.path}:{number}: expected an answer. Fix: another --out")
        answer = Answer(**values)
        self.answers[answer.key] = answer

    def _compare(self, head: Mapping[str, Any]) -> None:
        """Refuse a file that was made with other settings."""
        settings = head.get("settings")
        if head.get("format") != _FORMAT or not isinstance(settings, dict):
            raise InputError(f"{self.path}: expected answers of carryon score. Fix: another --out")
        for name in self._settings.keys() | settings.keys():
            old, new = settings.get(name), self._settings.get(name)
            if old != new:
                raise InputError(
                    f"{self.path}: {name}: expected {new!a:.80}, got answers made with "
                    f"{old!a:.80}. Fix: another --out"
                )


def _is_sound(item: tuple[str, Any]) -> bool:
    """Return whether a field of an answer has its type, and a number can be one of its kind."""
    name, value = item
    kind = _TYPES[name]
    if kind in (int, float):
        kinds = (int,) if kind is int else (int, float)
        return type(value) in kinds and 0 <= value <= _MAX_COUNT
    return type(value) is kind
