"""SmolLM2 as anchor and Qwen2.5 beside it, with their real tokenizers: edits of later text."""

import os
from pathlib import Path
from typing import Any

import pytest
from support.aligned_tokenizers import TEXTS
from transformers import AutoTokenizer

from carryon.cache.alignment.records import AlignedSample, Aligner, BaseTexts
from carryon.cache.corpus.records import read_record
from carryon.cache.corpus.rows import Row
from carryon.cache.settings import CorpusSettings
from carryon.tools.bench.alignment import PROSE, count_leaks

pytestmark = pytest.mark.real
FOLDERS = {"CARRYON_SMOLLM2": "SmolLM2-135M-Instruct", "CARRYON_QWEN": "Qwen2.5-0.5B-Instruct"}
"""Environment variable -> the tokenizer that its folder holds."""
NUM_EDITS = int(os.environ.get("CARRYON_EDITS", "200"))


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


def test_edits_of_later_text_change_nothing(aligners: list[Aligner]) -> None:
    source = PROSE + "".join(TEXTS).replace("\u0308", "").replace("\u0323", "")
    source += Path(__file__).read_text(encoding="utf-8")[:3000]
    leaks = count_leaks(aligners, source, edits=NUM_EDITS)
    assert leaks.changed == 0, leaks.first
    assert leaks.edits == NUM_EDITS
    assert leaks.compared > 10 * NUM_EDITS


def test_most_rows_are_in_the_trunk(aligners: list[Aligner]) -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    made = align(aligners[0], {"text": text})
    num_trunk = int((made.tree.parents + 1 == range(len(made.tree.parents))).sum())
    assert (made.tree.exact < num_trunk).mean() > 0.75
    assert len(made.tree.tokens) < 1.4 * num_trunk
