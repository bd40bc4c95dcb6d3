"""SmolLM2 as anchor and Qwen2.5 beside it, with their real tokenizers: edits of later text."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
from support.aligned_tokenizers import TEXTS
from transformers import AutoTokenizer

from carryon.cache.alignment.records import AlignedSample, Aligner, BaseTexts, path_to
from carryon.cache.corpus.records import read_record
from carryon.cache.corpus.rows import Row
from carryon.cache.settings import CorpusSettings

pytestmark = pytest.mark.real
FOLDERS = {"CARRYON_SMOLLM2": "SmolLM2-135M-Instruct", "CARRYON_QWEN": "Qwen2.5-0.5B-Instruct"}
"""Environment variable -> the tokenizer that its folder holds."""
NUM_EDITS = int(os.environ.get("CARRYON_EDITS", "200"))
ADDED = [
    *("s", "ing", " ", "\n", "\n\n", "    ", "\t", "'ll", "'", "1", "(", "<|im_end|>", "<|im_"),
    *("\u4f60", "\U0001f600", "\U0001f468\u200d\U0001f469", "\u00fc", "\u0e01\u0e33", "\r\n"),
]


@pytest.fixture(scope="module")
def aligners() -> list[Aligner]:
    """Qwen2.5 aligned to SmolLM2, and the other way round."""
    readings = []
    for variable, name in FOLDERS.items():
        folder = Path(os.environ.get(variable, ""))
        if not (folder / "tokenizer.json").is_file():
            pytest.skip(f"set {variable} to a folder with the tokenizer of {name}")
        readings.append(
            BaseTexts(
                AutoTokenizer.from_pretrained(folder),
                name=name,
                settings=CorpusSettings(),
                max_tokens=4096,
                end_tokens=(),
                vocab_size=None,
            )
        )
    return [Aligner(*readings), Aligner(*readings[::-1])]


def align(aligner: Aligner, fields: dict[str, Any]) -> AlignedSample:
    """Return the one sample of a record."""
    row = Row(
        fields=fields, where="line 1", made_id="r", is_held_out=False, expected="", num_bytes=1
    )
    made, *_ = aligner.align(read_record(row))  # of a conversation, its first sample
    return made


def seen_at(aligned: AlignedSample, row: int) -> tuple[Any, ...]:
    """Return everything that is known at an anchor token."""
    tree = aligned.tree
    paths = [path_to(tree, int(nodes[row])) for nodes in (tree.exact, tree.stable)]
    return *paths, int(tree.covered[row]), int(tree.is_whole[row])


def test_edits_of_later_text_change_nothing(aligners: list[Aligner]) -> None:
    draw = random.Random(0)
    source = "".join(TEXTS).replace("\u0308", "").replace("\u0323", "")
    source += Path(__file__).read_text(encoding="utf-8")[:3000]
    compared = 0
    for number in range(NUM_EDITS):
        start = draw.randrange(len(source) - 120)
        text = source[start : start + 120]
        at = draw.randrange(1, len(text))
        edited = text[:at] + draw.choice(["", *ADDED]) + text[at + draw.choice([0, 0, 1, 3, 9]) :]
        if number % 2:
            chats = [
                [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": each}]
                for each in (text, edited)
            ]
            if number % 4 == 1:
                chats[1] += [
                    {"role": "user", "content": "and"},
                    {"role": "assistant", "content": "x"},
                ]
            records = [{"messages": chat} for chat in chats]
        else:
            records = [{"text": text}, {"text": edited}]
        if not all(each["text"].strip() for each in records if "text" in each):
            continue
        aligner = aligners[number % 3 == 0]
        first, second = (align(aligner, record) for record in records)
        offset = 0
        for row in range(min(len(first.sample.tokens), len(second.sample.tokens))):
            ends = [int(each.sample.char_end[row]) for each in (first, second)]
            if number % 2 and not offset:  # where the answer begins in the anchor's text
                offset = _answer_start(aligner, records[0])
            if first.sample.tokens[row] != second.sample.tokens[row] or max(ends) > at + offset:
                break
            assert seen_at(first, row) == seen_at(second, row), (number, text, edited, row)
            compared += 1
    assert compared > 10 * NUM_EDITS


def _answer_start(aligner: Aligner, record: dict[str, Any]) -> int:
    row = Row(fields=record, where="", made_id="r", is_held_out=False, expected="", num_bytes=1)
    return aligner._anchor.pieces(read_record(row))[0].cuts[0]


def test_most_rows_are_in_the_trunk(aligners: list[Aligner]) -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    made = align(aligners[0], {"text": text})
    num_trunk = int((made.tree.parents + 1 == range(len(made.tree.parents))).sum())
    assert (made.tree.exact < num_trunk).mean() > 0.75
    assert len(made.tree.tokens) < 1.4 * num_trunk
