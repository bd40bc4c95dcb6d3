"""A folder with problems that a random base solves often, by a rule of the user."""

import sys
from pathlib import Path

import pytest
from support.easy_problems import write_easy_problems


@pytest.fixture
def easy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `problems.jsonl` and the rules `easy_rule:accept` and `:refuse`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "easy_rule", raising=False)  # of another test's folder
    write_easy_problems(tmp_path)
    return tmp_path
