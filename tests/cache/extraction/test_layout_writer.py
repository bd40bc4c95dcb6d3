"""Writing a plan: every file is on the disk before the manifest names it."""

import os
from pathlib import Path

import pytest
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
