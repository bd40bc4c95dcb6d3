"""A folder with problems that a random base solves often, by a rule of the user."""

import json
import sys
from pathlib import Path

import pytest

RULE = """
def accept(text, problem):
    return sum(map(ord, text)) % 4 != 0

def refuse(text, problem):
    return False
"""


@pytest.fixture
def easy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `problems.jsonl` and the rules `easy_rule:accept` and `:refuse`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "easy_rule", raising=False)  # of another test's folder
    (tmp_path / "easy_rule.py").write_text(RULE)
    records = [
        {"id": f"q{number}", "question": f"{'the ' * (number % 4 + 1)}{number}", "answer": "x"}
        for number in range(16)
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return tmp_path
