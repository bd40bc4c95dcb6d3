"""The speed of scored answers: skipped without vLLM, and what is counted."""

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.benchmarks import measure
from support.tiny_bases import make_tiny_base

from carryon.tools.bench.accuracy.answers import answer_speed


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_one_line_says_why_nothing_is_measured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert measure("accuracy.answers", tmp_path, base="nowhere") == []
    [record] = caplog.records
    assert record.message.startswith("accuracy.answers: skipped, --engine vllm needs the package")


def test_tokens_of_all_answers_count(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", context=1024, max_position_embeddings=1024)
    out = tmp_path / "answers.jsonl"
    speed = answer_speed(
        str(base), out, engine="transformers", answers=3, max_new_tokens=4, batch_rows=2
    )
    assert speed > 0
    assert len(out.read_text().splitlines()) == 1 + 3
