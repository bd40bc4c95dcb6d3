"""Places that nothing can be written to are named before the work."""

from pathlib import Path

import pytest

from carryon.cache.errors import InputError
from carryon.tools.cli.main import main
from carryon.tools.cli.places import check_folder, check_page, write_page


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    check_folder(str(tmp_path / "new" / "folder"), name="--out")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        with pytest.raises(InputError, match="--out: expected a folder, got the file"):
            check_folder(str(tmp_path / place), name="--out")


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "page.html", tmp_path / "file" / "b" / "page.html"):
        with pytest.raises(InputError, match="--html: expected a place for a file, got"):
            check_page(str(place), name="--html")
    with pytest.raises(InputError, match="--html: expected a file for the page, got the folder"):
        check_page(str(tmp_path), name="--html")
    with pytest.raises(InputError, match="--html: expected a file for the page, got nothing"):
        check_page("", name="--html")
    with pytest.raises(InputError, match="--html: expected a place for a file, got /proc/x.html"):
        write_page("/proc/x.html", "x", name="--html")
    check_page(str(tmp_path / "new" / "page.html"), name="--html")
    write_page(str(tmp_path / "new" / "page.html"), "x", name="--html")
    assert (tmp_path / "new" / "page.html").read_text() == "x"


@pytest.mark.parametrize(
    "argv", [["demo"], ["compare", "--base", "./nothing", "--data", "nothing.jsonl"]]
)
def test_commands_name_a_file_in_place_of_their_folder(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert main([*argv, "--out", str(tmp_path / "file")]) == 2
    assert "--out: expected a folder, got the file" in capsys.readouterr().err
