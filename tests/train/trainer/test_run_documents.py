"""Lines and documents of a run."""

from pathlib import Path

from carryon.train.trainer.run_documents import append_line, read_whole_lines


def test_lines_are_read_up_to_one_cut_off_by_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert read_whole_lines(path) == ([], [])
    lines = [{"step": 1, "a": 1}, {"step": 2, "b": "\u00e9"}]
    for line in lines:
        append_line(path, line)
    with path.open("a") as file:
        file.write('{"step": ')
    assert read_whole_lines(path) == (lines, [])
