"""Wrong files of hidden states are refused, each by name; right ones are not."""

from pathlib import Path

import pytest

from carryon.cache.base.model import Base
from carryon.tools.bench.exchange.guards import WRONG, Wrong, try_import


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_by_name(tiny_base: Base, store_tmp: Path, name: str) -> None:
    wrong = WRONG[name]
    error, path = try_import(store_tmp, tiny_base, wrong)
    assert wrong.says in error
    assert "\n" not in error
    assert "Fix: " in error
    assert not wrong.names_file or path in error


@pytest.mark.parametrize("is_data_set", [False, True])
def test_right_files_are_taken(tiny_base: Base, store_tmp: Path, is_data_set: bool) -> None:
    right = Wrong(says="", is_data_set=is_data_set)
    assert try_import(store_tmp, tiny_base, right)[0] == ""
