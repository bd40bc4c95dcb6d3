"""Files that are whole or not there."""

import errno
import os
from pathlib import Path

import pytest
from support.tiny_stores import audit

from carryon.cache.errors import DiskFullError
from carryon.cache.files import disk_full_named, json_bytes, sweep_partials, write_file, write_json


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


def test_another_error_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), disk_full_named(tmp_path):
        raise PermissionError(errno.EACCES, "not yours")


def test_json_has_one_form(tmp_path: Path) -> None:
    content = write_json(tmp_path / "a.json", {"b": 1, "a": {"d": [1.5, None], "c": "\u00e9"}})
    assert content == json_bytes({"a": {"c": "\u00e9", "d": [1.5, None]}, "b": 1})
    assert (tmp_path / "a.json").read_bytes() == content
    assert content.isascii()
