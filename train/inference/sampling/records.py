"""Records of a sampled corpus: conversations, and where each is from.

Extraction ignores the field `sampled`, which holds the provenance.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError, MissingError
from carryon.cache.files.documents import parse_json, read_bounded
from carryon.train.inference.sampling.selection import normalize
from carryon.train.inference.scoring.problems import PROVENANCE, Problem

MAX_CORPUS_BYTES = 1 << 32
_DIGITS = 12


def make_record(
    problem: Problem,
    question: str,
    text: str,
    *,
    is_chat: bool,
    is_held_out: bool,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the record of an answer.

    Args:
        problem: that was posed.
        question: as it is stored, with or without the instruction.
        text: the answer.
        is_chat: whether prompts go through a chat template; else the record is plain text.
        is_held_out: whether training only evaluates on it.
        provenance: for the field `sampled`; the problem is added.
    """
    digest = hashlib.sha256(f"{question}\0{normalize(text)}".encode()).hexdigest()
    record: dict[str, Any] = {"id": f"{problem.id}-{digest[:_DIGITS]}"}
    if is_chat:
        record["messages"] = [
            *problem.before,
            {"role": "user", "content": question},
            {"role": "assistant", "content": text.strip()},
        ]
    else:
        before = [str(message["content"]) for message in problem.before]
        record |= {"prompt": "\n\n".join([*before, question]), "completion": text}
    if problem.group:
        record["split_group"] = problem.group
    if is_held_out:
        record["split"] = "held-out"
    origin = {"problem": problem.id, "question": problem.question, "right": problem.answer}
    return {**record, PROVENANCE: {**origin, **provenance}}


def choose_held_out(
    problems: Iterable[Problem], *, ratio: float, is_first: bool = True
) -> set[str]:
    """Return `half` of the problems to hold out.

    Not their ids: what is asked again, in this corpus or in that of a later round, goes to the same
    half, and so does a whole group.

    Args:
        problems: of a corpus.
        ratio: fraction to hold out.
        is_first: whether there is no earlier corpus to train on: all are never held out then.
    """
    halves = {problem.half for problem in problems}
    chosen = {each for each in halves if _share(each) < ratio}
    return chosen if chosen < halves or not is_first else set()


def read_known(paths: Sequence[str]) -> dict[str, list[str]]:
    """Return the answers in sampled corpora: question -> texts.

    Raises:
        MissingError: a file is not there.
        InputError: a file is no sampled corpus.
    """
    known: dict[str, list[str]] = {}
    for path in paths:
        if not Path(path).is_file():
            raise MissingError(f"known: expected a corpus of carryon sample, got none at {path}")
        content = read_bounded(Path(path), max_bytes=MAX_CORPUS_BYTES)
        for number, line in enumerate(content.splitlines(), 1):
            question, text = _read_line(line, where=f"{path}:{number}")
            known.setdefault(question, []).append(text)
    return known


def to_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return records as JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _read_line(line: bytes, *, where: str) -> tuple[str, str]:
    try:
        record = parse_json(line)
        text = record["messages"][-1]["content"] if "messages" in record else record["completion"]
        question = record[PROVENANCE]["question"]
        if isinstance(question, str) and isinstance(text, str):
            return question, text
    except (ValueError, KeyError, IndexError, TypeError):
        pass
    raise InputError(f"known: {where}: expected a record of carryon sample, got another")


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
