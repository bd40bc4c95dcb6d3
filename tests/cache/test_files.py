"""Atomic writes of files and folders."""

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest
from support.tiny_stores import audit, states_at_kills

from carryon.cache.errors import DiskFullError, StoreBusyError
from carryon.cache.files.atomic import (
    disk_full_named,
    recover_folder,
    remove_folder,
    sweep_partials,
    sync_below,
    whole_folder,
    write_file,
)
from carryon.cache.files.documents import json_bytes, write_json
from carryon.cache.files.full_disk import disk_full_number


def test_a_file_appears_whole_and_replaces_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder" / "file"
    for content in (b"one", b"another, longer", b""):
        write_file(path, content)
        assert path.read_bytes() == content
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_until_the_rename_the_old_file_stands(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")
    seen: list[tuple[bytes, list[bytes]]] = []

    def look(event: str, arguments: tuple[object, ...]) -> None:
        partials = [each.read_bytes() for each in tmp_path.glob(".*.partial")]
        seen.append((path.read_bytes(), partials))

    with audit(look, ("os.rename",)):
        write_file(path, b"new")
    assert seen == [(b"old", [b"new"])]
    assert path.read_bytes() == b"new"


class Stopped(BaseException):
    """As Ctrl-C."""


@pytest.mark.parametrize("event", ["os.rename", "open"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, event: str
) -> None:
    path = tmp_path / "file"
    write_file(path, b"old")

    def stop(event: str, arguments: tuple[object, ...]) -> None:
        if str(arguments[0]).endswith(".partial"):
            raise Stopped

    with audit(stop, (event,)), pytest.raises(Stopped):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_only_partial_files_are_swept(tmp_path: Path) -> None:
    for name in ("a/.x.1.partial", "a/b/.y.22.partial", "a/x", "a/partial", "a/.hidden"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert sweep_partials(tmp_path) == 2
    kept = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert kept == [".hidden", "partial", "x"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_left_names_the_file(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(DiskFullError, match=f"full while writing {tmp_path}: what was finished"),
        disk_full_named(tmp_path),
    ):
        raise OSError(number, os.strerror(number))


def test_other_disk_errors_are_unchanged(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disk_full_named(tmp_path):
        raise PermissionError(errno.EACCES, "not yours")


def test_json_has_one_canonical_form(tmp_path: Path) -> None:
    content = write_json(tmp_path / "a.json", {"b": 1, "a": {"d": [1.5, None], "c": "\u00e9"}})
    assert content == json_bytes({"a": {"c": "\u00e9", "d": [1.5, None]}, "b": 1})
    assert (tmp_path / "a.json").read_bytes() == content
    assert content.isascii()


OLD = {"a": b"old", "deep/b": b"old too"}
NEW = {"a": b"new", "deep/c": b"new too"}


def fill(folder: Path, files: dict[str, bytes]) -> None:
    with whole_folder(folder) as partial:
        for name, content in files.items():
            write_file(partial / name, content, is_synced=False)


def content_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_replacing_a_folder_killed_before_any_change_leaves_the_old_or_the_new_one(
    tmp_path: Path,
) -> None:
    root = tmp_path / "root"
    fill(root / "folder", OLD)
    copies = states_at_kills(
        root, lambda: fill(root / "folder", NEW), at=lambda _: True, into=tmp_path / "killed"
    )
    seen = []
    for copy in copies:
        recover_folder(copy / "folder")
        seen.append(content_of(copy / "folder"))
        fill(copy / "folder", {"last": b""})
        assert content_of(copy) == {"folder/last": b""}
    num_old = seen.count(OLD)
    assert num_old >= 5
    assert seen == [OLD] * num_old + [NEW] * (len(copies) - num_old)
    assert len(copies) - num_old >= 4
    assert content_of(root) == {f"folder/{name}": content for name, content in NEW.items()}


def test_a_folder_removed_and_killed_before_any_change_is_whole_or_gone(tmp_path: Path) -> None:
    root = tmp_path / "root"
    fill(root / "folder", OLD)
    copies = states_at_kills(
        root, lambda: remove_folder(root / "folder"), at=lambda _: True, into=tmp_path / "killed"
    )
    assert len(copies) > len(OLD)
    for copy in copies:
        assert not (copy / "folder").exists() or content_of(copy / "folder") == OLD
    assert content_of(root) == {}


def test_a_folder_that_cannot_be_filled_leaves_the_old_one(tmp_path: Path) -> None:
    fill(tmp_path / "folder", OLD)
    with suppress(Stopped), whole_folder(tmp_path / "folder") as partial:
        (partial / "a").write_bytes(b"new")
        raise Stopped
    assert content_of(tmp_path) == {f"folder/{name}": content for name, content in OLD.items()}
    with whole_folder(tmp_path / "folder") as partial:
        recover_folder(tmp_path / "folder")
        assert not list(partial.iterdir())
    assert content_of(tmp_path) == {}


def test_a_reader_that_recovers_while_a_folder_is_replaced_stops_neither(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    fill(folder, OLD)
    has_read = False

    def read(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal has_read
        if str(arguments[0]).endswith(".partial") and not has_read:
            has_read = True  # the old one has been set aside, the new one has no name yet
            recover_folder(folder)
            assert content_of(folder) == OLD

    with audit(read, ("os.rename",)):
        fill(folder, NEW)
    assert has_read
    assert content_of(tmp_path) == {f"folder/{name}": content for name, content in NEW.items()}


def test_every_file_and_folder_of_a_new_folder_is_flushed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(path_of(handle)))
    fill(tmp_path / "folder", OLD)
    partial = tmp_path / ".folder.partial"
    names = ("a", "deep/b", "deep", ".")
    assert sorted(flushed) == sorted([*(str(partial / name) for name in names), str(tmp_path)])
    flushed.clear()
    write_file(tmp_path / "x/y/file", b"", is_synced=False)
    assert not flushed
    sync_below(tmp_path, [tmp_path / "x/y/file"])
    assert set(flushed) == {
        str(each) for each in (tmp_path / "x/y/file", *(tmp_path / "x/y/file").parents[:3])
    }


def path_of(handle: int) -> str:
    return os.readlink(f"/proc/self/fd/{handle}")


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "carryon"
    with whole_folder(path) as partial:
        (partial / "weights").write_bytes(b"ours")
        busy = pytest.raises(StoreBusyError, match="process [0-9]+ is writing to this folder")
        with busy, whole_folder(path):
            pass
    assert (path / "weights").read_bytes() == b"ours"
    assert [each.name for each in tmp_path.iterdir()] == ["carryon"]


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (OSError("Error writing bytes to file. Detail: [errno 27] File too large"), errno.EFBIG),
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (OSError(errno.EACCES, "Permission denied"), None),
        (ValueError("errno 280"), None),
    ],
)
def test_a_full_disk_is_told_from_errors_of_libraries_too(
    error: Exception, number: int | None
) -> None:
    assert disk_full_number(error) == number
