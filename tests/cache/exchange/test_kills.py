"""Imports, exports and recodings that are killed: the same call again ends as one never killed."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from signal import SIGKILL

import pytest
from support.tiny_stores import (
    SETTINGS,
    count_changes,
    extract_tiny,
    files_below,
    kill_at,
    readable_content,
    receipts_in,
    states_at_kills,
)

from carryon.cache.base.model import Base
from carryon.cache.exchange import units
from carryon.cache.exchange.exporting import export_speculators
from carryon.cache.exchange.importing import plan_import, run_import
from carryon.cache.exchange.settings import ImportSettings
from carryon.cache.settings import ForwardSettings
from carryon.tools.bench.exchange.state_files import LAYERS, make_tokens, write_states
from carryon.tools.cli.main import main

FORWARD = ForwardSettings(device="cpu", compute_dtype="float32")


COUNTS = ("imported_units", "recoded_units", "written_files")
"""What a call wrote, in the report of each command."""


def import_files(folder: Path, base: Base | str, out: Path) -> int:
    """Import files and return the units that this call wrote."""
    settings = ImportSettings(layer_ids=list(LAYERS), unit_tokens=64)
    plan = plan_import(folder, base=base, out=out, imports=settings, forward=FORWARD)
    return run_import(plan).imported_units


def export(store: Path, out: Path) -> int:
    """Export a store and return the files that this call wrote."""
    return export_speculators(store, out=out).written_files


@pytest.fixture
def files(tiny_base: Base, store_tmp: Path) -> Path:
    """Files of twelve samples."""
    return write_states(store_tmp / "files", tiny_base, make_tokens(12))


@pytest.fixture
def prenorm_store(tiny_base: Base, store_data: Path, store_tmp: Path) -> Path:
    """A store that can be exported."""
    root = store_tmp / "prenorm"
    extract_tiny(tiny_base, store_data, root, store=replace(SETTINGS, taps=["prenorm"]))
    return root


def test_an_import_killed_before_any_change_is_resumed_by_the_same_call(
    files: Path, tiny_base: Base, store_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A copy of the folder is its state at one instant only while no other thread writes.
    monkeypatch.setattr(units, "_WRITERS", 1)
    num_units = import_files(files, tiny_base, store_tmp / "whole")
    expected = readable_content(store_tmp / "whole")
    root, into = store_tmp / "run", store_tmp / "killed"
    into.mkdir()
    run = partial(import_files, files, tiny_base, root)
    copies = states_at_kills(root, run, at=lambda number: number % 37 == 0, into=into)
    assert len(copies) >= 4
    for copy in copies:
        before = receipts_in(copy)
        assert import_files(files, tiny_base, copy) == num_units - len(before)
        after = receipts_in(copy)
        assert {name: after[name] for name in before} == before
        assert readable_content(copy) == expected
        assert not [path for path in files_below(copy) if ".partial" in path]


def test_an_export_killed_before_any_change_is_resumed_by_the_same_call(
    prenorm_store: Path, store_tmp: Path
) -> None:
    export(prenorm_store, store_tmp / "whole")
    expected = files_below(store_tmp / "whole")
    root, into = store_tmp / "run", store_tmp / "killed"
    into.mkdir()
    run = partial(export, prenorm_store, root)
    copies = states_at_kills(root, run, at=lambda n: n < 12 or n % 17 == 0, into=into)
    assert len(copies) >= 8
    for copy in copies:
        export(prenorm_store, copy)
        assert files_below(copy) == expected


@pytest.mark.parametrize("command", ["import vllm", "recode", "export speculators"])
def test_a_command_that_is_killed_is_resumed_and_a_second_run_writes_nothing(
    command: str,
    files: Path,
    prenorm_store: Path,
    tiny_base_folder: Path,
    store_tmp: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = {
        "import vllm": [str(files), "--base", str(tiny_base_folder), "--device", "cpu"]
        + ["--layer-ids", "0", "1", "2", "--unit-tokens", "64"],
        "recode": [str(prenorm_store), "--profile", "raw"],
        "export speculators": [str(prenorm_store)],
    }
    words = [*command.split(), *options[command], "--out"]

    def written(root: Path) -> int:
        assert main([*words, str(root)]) == 0
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        return int(sum(report.get(name, 0) for name in COUNTS))

    content = files_below if command.startswith("export") else readable_content
    whole = store_tmp / "whole"
    changes = count_changes(whole, lambda: written(whole))
    for number in (changes // 4, changes * 3 // 4):
        root = store_tmp / str(number)
        root.mkdir()  # an empty folder is taken
        assert kill_at(number, root, partial(main, [*words, str(root)])) == -SIGKILL
        assert files_below(root)
        written(root)
        assert content(root) == content(whole)
        assert written(root) == 0
