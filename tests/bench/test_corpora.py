"""Corpora of the benchmarks."""

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from carryon.cache.errors import InputError
from carryon.tools.bench.corpora import read_documentation, read_page, write_named_corpus


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(name: str, folder: Path, *, num_tokens: int) -> list[dict[str, Any]]:
    """Write a corpus and return its records."""
    write_named_corpus(name, folder / f"{name}.jsonl", num_tokens=num_tokens)
    return read_lines(folder / f"{name}.jsonl")


def questions_of(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the questions of each half."""
    halves: dict[str, list[str]] = {"train": [], "held-out": []}
    for record in records:
        halves[record["split"]].append(record["messages"][0]["content"])
    return halves


def test_python_corpus_is_source_of_the_standard_library(tmp_path: Path) -> None:
    records = write("python", tmp_path, num_tokens=2000)
    assert sum(len(record["text"]) for record in records) == 7800
    assert all(record["id"].endswith(".py") for record in records)


def test_reference_documentation_is_split_by_topic(tmp_path: Path) -> None:
    records = write("pydoc", tmp_path, num_tokens=5000)
    assert len({record["id"] for record in records}) == len(records) > 1
    assert 15_000 < sum(len(record["text"]) for record in records) <= 20_000


@pytest.mark.skipif(
    shutil.which("man") is None or not Path("/usr/share/man/man1").is_dir(),
    reason="this system has no manual pages",
)
def test_manual_pages_are_plain_text(tmp_path: Path) -> None:
    records = write("manpages", tmp_path, num_tokens=1000)
    assert records
    for record in records:
        assert "\b" not in record["text"]
        assert not any(line.startswith((".SH", ".TH")) for line in record["text"].splitlines())


def test_worked_problems_have_no_question_in_both_halves(tmp_path: Path) -> None:
    halves = questions_of(write("gsm", tmp_path, num_tokens=190_000))
    assert (len(halves["train"]), len(halves["held-out"])) == (1000, 200)
    assert not set(halves["train"]) & set(halves["held-out"])


def test_documentation_mixes_prose_and_code(tmp_path: Path) -> None:
    records = write("mixed", tmp_path, num_tokens=4000)
    assert records
    for record in records:
        assert record["id"].endswith((".md", ".rst", ".py"))
        assert any(mark in record["text"] for mark in ("```", "::\n\n", ">>> ")) or (
            record is records[-1]  # cut where the corpus is long enough
        )


def test_a_page_whose_code_is_beyond_its_cut_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prose = "Words of a page.\n" * 1000
    for name, text in {"early": f">>> 1\n{prose}", "late": f"{prose}>>> 1\n"}.items():
        (tmp_path / f"{name}.md").write_text(text)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert [name for name, _ in read_documentation()] == ["early.md"]


def test_a_page_is_read_whatever_its_code_is_warned_of(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""Digits.\n\n>>> find("1")\n"""\nPATTERN = "\\d"\n')
    assert read_page(module).startswith("Digits.")


def test_an_unknown_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="corpus 'x': expected gsm, python, pydoc, manpages, mixed, or"
    ):
        write("x", tmp_path, num_tokens=10)
