"""The benchmark of hostile documents: what it changes, and that it notices what it counts."""

from functools import partial
from pathlib import Path

import pytest
from support.benchmarks import measure, names_of

from carryon.tools.bench.trust import documents, hostile
from carryon.tools.bench.trust.calls import call
from carryon.tools.bench.trust.table import make_things


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("documents")
    (root / "given").mkdir()
    documents.make_given(make_things(root / "made"), root / "given")
    return root / "given"


@pytest.mark.parametrize("group", documents.GROUPS, ids=lambda group: group.thing)
def test_every_command_succeeds_where_nothing_was_changed(
    given: Path, tmp_path: Path, group: documents.Group
) -> None:
    for number, text in enumerate(group.commands):
        trial = tmp_path / f"trial-{number}"
        trial.mkdir()
        documents.copy_things(group, given, trial)
        ended = call(text.split(), cwd=trial)
        assert ended.code == 0, ended.err


def test_a_few_documents_are_tried(tmp_path: Path) -> None:
    figures = measure("trust.documents", tmp_path)
    kinds = ["tracebacks", "hangs", "outside", "memory", "escapes"]
    assert names_of(figures) == [f"trust.documents.{kind}" for kind in kinds]
    assert {figure.value for figure in figures if figure.figure != "trust.documents.memory"} == {0}


def test_a_write_outside_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "document"
    hostile.make_canaries(folder)
    (folder / "store").mkdir()
    before = hostile.entries_of(folder, "store")
    (folder / "store" / "x").touch()
    assert hostile.entries_of(folder, "store") == before
    for write in (
        (folder / "other").touch,
        partial((folder / "canary").write_text, "of a stranger"),
        partial((tmp_path / "canary").write_text, "of a stranger"),
    ):
        before = hostile.entries_of(folder, "store")
        write()
        assert hostile.entries_of(folder, "store") != before
