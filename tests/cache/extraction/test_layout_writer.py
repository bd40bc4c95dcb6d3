"""Writing a plan: every file is on the disk before the manifest names it."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import tiny_stores
from support.tiny_stores import (
    Given,
    audit,
    extract_tiny,
    files_below,
    make_given,
    plan_given,
    small_pieces,
)

from carryon.cache.base.model import Base
from carryon.cache.errors import StoreBusyError


@pytest.fixture
def given() -> Given:
    return make_given()


class Flushes:
    """Records which paths are flushed, and what was not yet when a manifest got its name."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.paths, self.missed = root, set[str](), list[set[str]]()
        monkeypatch.setattr(os, "fsync", self._flush)
        monkeypatch.setattr(os, "sync", lambda: pytest.fail("flushed what others wrote"))

    def _flush(self, handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if not path.endswith(".partial"):
            self.paths.add(path)
            return
        folder, name = os.path.split(path)
        self.paths.add(f"{folder}/{name.rsplit('.', 2)[0].removeprefix('.')}")

    def look(self, event: str, arguments: tuple[object, ...]) -> None:
        if str(arguments[1]) == str(self.root / "zarr.json"):
            own = {"units/copy/zarr.json", "zarr.json"}
            written = {str(self.root / path) for path in files_below(self.root).keys() - own}
            written = {path for path in written if not path.endswith(".partial")}
            folders = {str(path.parent) for path in map(Path, written)} | {str(self.root.parent)}
            self.missed.append((written | folders) - self.paths)


def test_the_plan_is_on_the_disk_before_the_manifest(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushes = Flushes(tmp_path / "store", monkeypatch)
    with audit(flushes.look, ("os.rename",)), small_pieces():
        plan_given(tmp_path / "store", given)
    assert flushes.missed == [set()]


@pytest.mark.parametrize("at", ["tokens/c/1", "probe/top_logits/c/0/0", "hidden/zarr.json", ""])
def test_a_planner_that_was_overtaken_leaves_the_plan_of_the_other(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """It is paused before a file, or, with no name, after the last; its probe has other bytes."""
    root, plan_files = tmp_path / "store", tiny_stores.plan_files
    first = replace(given.pilot[0], logits=given.pilot[0].logits + 0.001)
    other = replace(given, pilot=[first, *given.pilot[1:]])

    def overtaken(*arguments: Any, **how: Any) -> Iterator[tuple[str, bytes]]:  # noqa: ANN401
        is_paused = False
        for path, content in plan_files(*arguments, **how):
            if at and path == at:
                is_paused = True
                overtake()
            yield path, content
        if not at:
            is_paused = True
            overtake()
        assert is_paused

    def overtake() -> None:
        monkeypatch.setattr(tiny_stores, "plan_files", plan_files)
        plan_given(root, given)
        before.update(files_below(root))

    before: dict[str, bytes] = {}
    monkeypatch.setattr(tiny_stores, "plan_files", overtaken)
    with small_pieces(), pytest.raises(StoreBusyError, match="store: .*Fix: run the same command"):
        plan_given(root, other)
    assert files_below(root) == before


def test_a_planner_whose_probe_another_has_overwritten_writes_no_manifest(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, plan_files = tmp_path / "store", tiny_stores.plan_files

    def overtaken(*arguments: Any, **how: Any) -> Iterator[tuple[str, bytes]]:  # noqa: ANN401
        yield from plan_files(*arguments, **how)
        (root / "probe/top_logits/c/0/0").write_bytes(b"of another")

    monkeypatch.setattr(tiny_stores, "plan_files", overtaken)
    with small_pieces(), pytest.raises(StoreBusyError):
        plan_given(root, given)
    assert not (root / "zarr.json").exists()


def test_an_appended_plan_is_on_the_disk_before_its_manifest(
    tiny_base: Base,
    store_folder: Path,
    store_more_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {str(store_folder / path) for path in files_below(store_folder)}
    before |= {str(path) for path in store_folder.rglob("*") if path.is_dir()}
    before.add(str(store_folder.parent))
    flushes = Flushes(store_folder, monkeypatch)
    with audit(flushes.look, ("os.rename",)):
        extract_tiny(tiny_base, store_more_data, store_folder, append=True)
    assert len(flushes.missed) == 2
    assert flushes.missed[1] - before == set()
