"""Alignment of two real tokenizers: its speed, and edits of later text that must change nothing.

Bases are named by stores; only their tokenizers and chat templates are read.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from carryon.cache.alignment.records import AlignedSample, Aligner, BaseTexts, path_to
from carryon.cache.base.facts import read_facts
from carryon.cache.base.recorded import recorded_source
from carryon.cache.corpus.records import Record, read_record
from carryon.cache.corpus.rows import Row
from carryon.cache.errors import InputError
from carryon.cache.progress import track
from carryon.cache.settings import CorpusSettings
from carryon.cache.store.reader import Store
from carryon.tools.bench.corpora import PYTHON, iter_documents
from carryon.tools.bench.job import Job, split_label

MOST_SECONDS = 10.0
"""For 1M tokens of the anchor, on one core."""
_CHARACTERS = 3.9
"""Of Python for a token of about 50,000; see corpora.py."""
_WINDOW = 120
"""Characters of a text that is edited."""
ADDED = (
    *("s", "ing", " ", "\n", "\n\n", "    ", "\t", "'ll", "'", "1", "(", "<|im_end|>", "<|im_"),
    *("\u4f60", "\U0001f600", "\U0001f468\u200d\U0001f469", "\u00fc", "\u0e01\u0e33", "\r\n"),
)
"""Texts that an edit puts in."""
PROSE = (
    "The quick brown fox's den isn't far; we'll see it, they've said.  Two  spaces.\n\n"
    "Gr\u00fc\u00dfe aus K\u00f6ln, caf\u00e9, \u4f60\u597d\u4e16\u754c\uff0c\u65e5\u672c\u8a9e"
    "\u306e\u6587\u7ae0\u3002 \u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439, "
    "\u043c\u0438\u0440! \uc548\ub155\ud558\uc138\uc694 \uc138\uacc4. \u0645\u0631\u062d\u0628"
    "\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0928\u092e\u0938\u094d\u0924\u0947 "
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01 emoji \U0001f600"
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea x\u0302 <|im_x <|im_start <\n"
)
"""Text in many scripts, in Unicode's form NFC."""


def measure_alignment(job: Job, *, tokens: int = 1_000_000, rounds: int = 1) -> None:
    """Align Python source with the tokenizers of two bases, each time with an empty cache.

    Seconds are of the processor, of all threads, so that other work on the machine adds little.

    Raises:
        InputError: fewer than two stores are given.
    """
    records = [
        _record(name, {"text": text})
        for name, text in iter_documents(PYTHON, num_characters=int(tokens * _CHARACTERS))
    ]
    runs, num_tokens, num_nodes, plain = [], 0, 0, []
    for _ in range(rounds):
        readings = _read_bases(job)  # tokenizers keep the words that they have seen
        started_at = time.process_time()
        for reading in readings:
            for record in records:
                for _ in reading.encoder.iter_encode(record.content.text):  # type: ignore[union-attr]
                    pass
        plain.append(time.process_time() - started_at)
        readings = _read_bases(job)
        started_at, aligner = time.process_time(), Aligner(*readings)
        num_tokens = num_nodes = 0
        for record in records:
            for aligned in aligner.align(record):
                num_tokens += len(aligned.sample.tokens)
                num_nodes += len(aligned.tree.tokens)
        runs.append(time.process_time() - started_at)
    seconds = min(runs)
    job.report(
        "mixing.align",
        seconds / num_tokens * 1e6,
        "s of one core for 1M tokens of the anchor, an empty cache",
        at_most=MOST_SECONDS,
        bases=[reading.name for reading in readings],
        tokens=num_tokens,
        nodes_per_token=num_nodes / num_tokens,
        seconds=runs,
        seconds_tokenizing_both=min(plain),
    )


def measure_leaks(job: Job, *, edits: int = 5000, seed: int = 0) -> None:
    """Edit later text, and compare all that was aligned before it.

    Raises:
        InputError: fewer than two stores are given, or nothing could be compared.
    """
    readings = _read_bases(job)
    code = [text[:3000] for _, text in iter_documents(PYTHON, num_characters=12_000)]
    source = "".join(part for each in code for part in (each, PROSE))
    aligners = [Aligner(*readings), Aligner(*readings[::-1])]
    leaks = count_leaks(aligners, source, edits=edits, seed=seed)
    if not leaks.compared:
        raise InputError(
            f"mixing.leak: expected positions before an edit, got none in {edits:,} edits. Fix: "
            "--sizes edits=5000"
        )
    job.report(
        "mixing.leak",
        leaks.changed,
        "positions before an edit of later text that changed",
        at_most=0,
        bases=[reading.name for reading in readings],
        edits=leaks.edits,
        compared=leaks.compared,
        first=leaks.first,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Leaks:
    """What edits of later text changed."""

    edits: int
    """That were tried."""
    compared: int
    """Positions before an edit that were compared: states' tokens and covered bytes."""
    changed: int
    """Of them."""
    first: str
    """The first of them; empty if there is none."""


def count_leaks(aligners: Sequence[Aligner], source: str, *, edits: int, seed: int = 0) -> Leaks:
    """Edit parts of a text at random, and compare every position before the edit.

    Every second text is the answer of a conversation.

    Args:
        aligners: a pair of bases, either as anchor.
        source: text to edit parts of, in Unicode's form NFC.
        edits: how many.
        seed: of the edits.
    """
    draw = random.Random(seed)
    compared = changed = done = 0
    first = ""
    numbers = iter(range(10 * edits))
    for _ in track(range(edits), total=edits, name="edit", unit="text"):
        fields, at = None, 0
        while fields is None or not all(map(_has_text, fields)):
            number = next(numbers)
            fields, at = _edited(draw, source, number)
        aligner = aligners[number % 3 == 0]
        records = [_record("r", each) for each in fields]
        pair = [next(iter(aligner.align(record))) for record in records]
        offset = aligner.answer_start(records[0]) if number % 2 else 0
        same, other = _compare(pair[0], pair[1], stop=at + offset)
        done += 1
        compared += same + other
        changed += other
        if other and not first:
            first = f"{fields[0]!a:.400} edited at {at}"
    return Leaks(edits=done, compared=compared, changed=changed, first=first)


def _edited(draw: random.Random, source: str, number: int) -> tuple[list[dict[str, Any]], int]:
    """Return a record and the same one edited, and where its text was edited."""
    start = draw.randrange(len(source) - _WINDOW)
    text = source[start : start + _WINDOW]
    at = draw.randrange(1, len(text))
    edited = text[:at] + draw.choice(["", *ADDED]) + text[at + draw.choice([0, 0, 1, 3, 9]) :]
    if number % 2 == 0:
        return [{"text": text}, {"text": edited}], at
    chats = [
        [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": each}]
        for each in (text, edited)
    ]
    if number % 4 == 1:
        chats[1] += [{"role": "user", "content": "and"}, {"role": "assistant", "content": "x"}]
    return [{"messages": chat} for chat in chats], at


def _has_text(fields: dict[str, Any]) -> bool:
    text: str = fields["text"] if "text" in fields else fields["messages"][1]["content"]
    return bool(text.strip())


def _compare(before: AlignedSample, after: AlignedSample, *, stop: int) -> tuple[int, int]:
    """Return how many positions up to a character are the same, and how many are not."""
    same = other = 0
    for row in range(min(len(before.sample.tokens), len(after.sample.tokens))):
        ends = [int(each.sample.char_end[row]) for each in (before, after)]
        if before.sample.tokens[row] != after.sample.tokens[row] or max(ends) > stop:
            break
        if _seen_at(before, row) == _seen_at(after, row):
            same += 1
        else:
            other += 1
    return same, other


def _seen_at(aligned: AlignedSample, row: int) -> tuple[Any, ...]:
    """Return everything that is known at an anchor token."""
    tree = aligned.tree
    paths = [path_to(tree, int(nodes[row])) for nodes in (tree.exact, tree.stable)]
    return *paths, int(tree.covered[row]), int(tree.is_whole[row])


def _record(name: str, fields: dict[str, Any]) -> Record:
    return read_record(
        Row(
            fields=fields,
            where=name,
            made_id=name,
            is_held_out=False,
            expected="",
            num_bytes=1,
        )
    )


def _read_bases(job: Job) -> list[BaseTexts]:
    """Return how the bases of two stores read records."""
    if len(job.given_stores) < 2:
        raise InputError(
            "--store: expected a store of each of two bases, got "
            f"{len(job.given_stores)}. Fix: --store A --store B"
        )
    return list(_read_each([split_label(each)[1] for each in job.given_stores[:2]]))


def _read_each(paths: Sequence[str]) -> Iterator[BaseTexts]:
    for path in paths:
        store = Store.open(path, allow_unfinished=True, allow_aligned=True)
        facts = read_facts(recorded_source(store.base, where=path))
        yield BaseTexts(
            facts.tokenizer,
            name=str(store.base["id"]),
            settings=CorpusSettings(),
            max_tokens=4096,
            end_tokens=facts.end_tokens,
            vocab_size=facts.vocab_size,
        )
