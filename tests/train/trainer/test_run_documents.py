"""Lines and documents of a run."""

import os
from pathlib import Path

import pytest

from carryon.cache.errors import DamagedFileError
from carryon.train.trainer.run_documents import append_line, lines_bytes, read_whole_lines


def test_lines_are_read_up_to_one_cut_off_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert read_whole_lines(path) == ([], [])
    lines = [{"step": 1, "a": 1}, {"step": 2, "b": "\u00e9"}]
    for line in lines:
        append_line(path, line)
    with path.open("a") as file:
        file.write('{"step": ')
    assert read_whole_lines(path) == (lines, [])


def test_a_changed_number_in_a_line_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = [{"step": step, "loss": 1.5, "rate": float("nan")} for step in range(3)]
    path.write_bytes(lines_bytes(lines))
    rows = path.read_text().splitlines(keepends=True)
    for changed in ("1.5", "NaN", "sha256", '"step"', " "):
        edited = rows[1].replace(changed, {" ": "\n"}.get(changed, changed[:-1] + "7"), 1)
        path.write_text("".join([rows[0], edited, rows[2]]))
        assert read_whole_lines(path)[1]
    path.write_text("".join(rows))
    assert repr(read_whole_lines(path)) == repr((lines, []))


def test_lines_from_before_digests_were_recorded_are_read(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"step": 1, "loss": 2.5}\n[]\n{"step": 2}\n')
    assert read_whole_lines(path) == ([{"step": 1, "loss": 2.5}, {"step": 2}], [2])


def test_lines_that_no_run_writes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    os.truncate(tmp_path / "metrics.jsonl", 1 << 40)
    with pytest.raises(DamagedFileError, match="expected at most"):
        read_whole_lines(tmp_path / "metrics.jsonl")
