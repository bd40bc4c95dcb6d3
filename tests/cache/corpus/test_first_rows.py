"""The first rows of each kind as samples."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bases import make_tiny_tokenizer

from carryon.cache.corpus.first_rows import MAX_SAMPLES, RecordSamples, read_first
from carryon.cache.corpus.report import Report
from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings, DataSettings

TOKENIZER = make_tiny_tokenizer()


def first_of(
    *data: Path,
    num_rows: int = 2,
    max_tokens: int = 64,
    **options: Any,  # noqa: ANN401
) -> tuple[list[RecordSamples], Report]:
    """Return the first records of files."""
    return read_first(
        list(data),
        TOKENIZER,
        num_rows=num_rows,
        settings=CorpusSettings(),
        max_tokens=max_tokens,
        data_settings=DataSettings(**options),
        end_tokens=[2],
    )


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write JSON lines; a string is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines))
    return path


def test_of_each_kind_the_first_rows_are_read(tmp_path: Path) -> None:
    texts = write_rows(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(5)])
    more = write_rows(tmp_path / "b.jsonl", [{"text": "other"}])
    pairs = write_rows(
        tmp_path / "c.jsonl", [{"prompt": "a", "chosen": "b", "rejected": str(n)} for n in range(5)]
    )
    records, report = first_of(texts, more, pairs)
    assert [(record.kind, record.where) for record in records] == [
        ("text", f"{texts}:1"),
        ("text", f"{texts}:2"),
        ("preference pair", f"{pairs}:1"),
        ("preference pair", f"{pairs}:2"),
    ]
    assert [sample.role for record in records for sample in record.samples] == [0, 0, 1, 2, 1, 2]
    assert (report.records, report.kept) == (4, 4)
    assert len(first_of(texts, more, num_rows=6)[0]) == 6


def test_rows_behind_the_first_are_not_looked_at(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}, "{"])
    assert len(first_of(path)[0]) == 2
    with pytest.raises(InputError, match=r"a\.jsonl:3: "):
        first_of(path, num_rows=3)


def test_the_report_tells_what_became_of_these_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, "{"])
    records, report = first_of(path, bad_rows="skip")
    assert len(records) == 1
    assert [(loss.reason, loss.records, loss.first) for loss in report.losses] == [
        ("bad row", 1, f"{path}:2")
    ]


def test_of_a_record_with_many_samples_the_first_are_kept(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "word " * 40}])
    [record], report = first_of(path, max_tokens=16)
    assert len(record.samples) == MAX_SAMPLES
    assert record.samples[0].id.endswith("#0")
    assert len(record.samples) + record.num_more == report.tokens // 16 + 1
