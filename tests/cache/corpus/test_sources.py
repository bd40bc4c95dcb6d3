"""Data as sources: paths, folders, names on the hub and rows in memory."""

import datetime
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
from support.corpus_files import fields_of, open_in, pack, read_all, write_lines, write_table
from support.tiny_stores import error_of

from carryon.cache.corpus.reading import split_names
from carryon.cache.corpus.reading.hub import HubName, parse_hub_name
from carryon.cache.corpus.reading.split_names import split_of_file
from carryon.cache.corpus.reading.tables import _whole_table
from carryon.cache.corpus.rows import Row
from carryon.cache.corpus.sources import describe_file, list_files, open_sources
from carryon.cache.errors import DiskFullError, InputError, MissingError
from carryon.cache.settings import DataSettings

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}], "id": "first"},
    {"prompt": "a", "completion": "b", "split": "held-out", "other": [1, 2]},
    {"text": "c", "id": 7},
]


TABLE = [{"text": "a"}, {"text": "b"}, {"text": "c"}]


def held_out(folder: Path, data: Any) -> dict[str, bool]:  # noqa: ANN401
    """Return for each source, by its path in `folder`, whether it is held out."""
    return {
        PurePath(source.name.replace(f"{folder}/", "")).as_posix(): source.is_held_out
        for source in open_in(folder.parent, data)
    }


def fill(folder: Path, *names: str) -> Path:
    """Write files of different content, each of the kind of its suffix, and return `folder`."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".parquet", ".arrow"):
            write_table(path, [{"text": name}])
        elif path.suffix == ".bin":
            path.write_bytes(b"\0\xff" + name.encode())
        else:
            path.write_text(
                f"text\n{name}\n" if path.suffix == ".csv" else json.dumps({"text": name})
            )
    return folder


def test_data_may_be_one_path_or_several(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    path = write_lines(folder / "data.jsonl", *ROWS)
    for data in (path, str(path), [path], (str(path),), iter([path]), folder):
        (source,) = open_in(tmp_path, data)
        assert (source.name, source.kind, source.packing) == (str(path), "json lines", "")
        assert [row.fields for row in read_all([source]) if isinstance(row, Row)] == ROWS
    assert open_in(tmp_path, []) == []


def test_the_kind_of_a_source_is_that_of_its_first_row_that_has_one(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('oops\n{"a": 1}\n{"prompt": "a", "completion": "b"}\n{"text": "c"}\n')
    (source,) = open_in(tmp_path, path)
    assert source.expected == "prompt and completion"
    assert {row.expected for row in read_all([source]) if isinstance(row, Row)} == {source.expected}
    path.write_text('{"a": 1}\n')
    assert open_in(tmp_path, path)[0].expected == ""


@dataclass(frozen=True)
class Layout:
    id: str
    files: tuple[str, ...]
    is_held_out: dict[str, bool]
    log: tuple[str, ...] = field(default=())


LAYOUTS = [
    Layout(
        "hub_shards",
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "README.md"),
        {"data/test-00000-of-00001.parquet": True, "data/train-00000-of-00001.parquet": False},
        ("README.md left out: no rows of data", "data/test-00000-of-00001.parquet held out"),
    ),
    Layout(
        "names",
        ("train.jsonl", "validation-a.jsonl", "my_test.csv", "DEV.json", "latest.jsonl", "x.tsv"),
        {
            "DEV.json": True,
            "latest.jsonl": False,
            "my_test.csv": True,
            "train.jsonl": False,
            "validation-a.jsonl": True,
            "x.tsv": False,
        },
    ),
    Layout(
        "folders",
        ("train/a.jsonl", "test/b.jsonl", "val/c/d.parquet", "e.jsonl"),
        {"e.jsonl": False, "test/b.jsonl": True, "train/a.jsonl": False, "val/c/d.parquet": True},
    ),
    Layout(
        "shards_of_one_split",
        ("data-00000-of-00001.parquet",),
        {"data-00000-of-00001.parquet": False},
    ),
    Layout(
        "tables_with_descriptions",
        ("a.csv", "README.md", "LICENSE", ".gitattributes", "dataset_infos.json", "b.bin", "x.py"),
        {"a.csv": False},
        ("LICENSE, README.md, b.bin, dataset_infos.json, x.py left out: no rows of data",),
    ),
    Layout(
        "texts",
        ("a.txt", "tests/test_b.py", "test.md", "LICENSE", "c.bin", ".git/config", "d/.e.txt"),
        {"LICENSE": False, "a.txt": False, "test.md": True, "tests/test_b.py": False},
        ("LICENSE read as texts", "c.bin left out: neither", "test.md held out"),
    ),
    Layout(
        "texts_in_folders_of_splits",
        ("train/a.txt", "test/b.txt", "c/test/d.txt"),
        {"c/test/d.txt": False, "test/b.txt": True, "train/a.txt": False},
    ),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.id)
def test_files_of_a_folder_are_told_apart_by_name(
    case: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = fill(tmp_path / "corpus", *case.files)
    assert held_out(folder, folder) == case.is_held_out
    assert list(held_out(folder, folder)) == sorted(case.is_held_out)
    for text in case.log:
        assert text in caplog.text


def test_split_keywords_are_those_of_datasets() -> None:
    from datasets.data_files import SPLIT_KEYWORDS

    known = {str(split): tuple(words) for split, words in SPLIT_KEYWORDS.items()}
    assert known == split_names._KEYWORDS


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train_sft-00000-of-00003.parquet", "train_sft"),
        ("data/test-00000-of-00003-abc.parquet", "test"),
        ("part-00000-of-00003.parquet", ""),
        ("train_test.jsonl", "test"),
        ("TEST.jsonl.gz", "test"),
        ("contest.jsonl", ""),
        ("eval/train.jsonl", "train"),
        ("eval/a.jsonl", "test"),
    ],
)
def test_the_split_of_a_file_is_told_by_its_name_then_by_its_folders(path: str, split: str) -> None:
    assert split_of_file(PurePath(path), is_text=False) == split


def test_splits_that_are_neither_trained_nor_held_out_are_refused_by_name(tmp_path: Path) -> None:
    names = [f"data/{s}-00000-of-00001.parquet" for s in ("train_sft", "test_sft", "train_gen")]
    folder = fill(tmp_path / "chat", *names)
    typed = ", ".join(f"{folder}:{split}" for split in ("test_sft", "train_gen", "train_sft"))
    with pytest.raises(
        InputError, match=r"got test_sft, train_gen, train_sft\. Fix: give "
    ) as error:
        open_in(tmp_path, folder)
    assert str(error.value).endswith(typed)
    assert held_out(folder, f"{folder}:train_sft") == {names[0]: False}
    assert held_out(folder, [f"{folder}:train_gen", f"{folder}:test_sft"]) == {
        names[2]: False,
        names[1]: True,
    }
    with pytest.raises(InputError, match=r"chat:dev: expected .* name of one, got test_sft"):
        open_in(tmp_path, f"{folder}:dev")


def test_one_split_of_a_folder_can_be_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "corpus", "a.jsonl", "test.jsonl", "valid.jsonl")
    assert held_out(folder, f"{folder}:train") == {"a.jsonl": False}
    assert held_out(folder, f"{folder}:test") == {"test.jsonl": True}
    assert held_out(folder, f"{folder}:validation") == {"valid.jsonl": True}
    with pytest.raises(InputError, match=r"expected a folder with splits, got a file\. Fix: give "):
        open_in(tmp_path, f"{folder / 'a.jsonl'}:train")
    with pytest.raises(MissingError, match=r"gone:train: no such file or folder"):
        open_in(tmp_path, f"{tmp_path / 'gone'}:train")


def test_a_path_with_a_colon_is_a_path(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a:train", {"text": "a"})
    (source,) = open_in(tmp_path, path)
    assert source.name == str(path)


def test_a_file_given_by_itself_is_for_training_whatever_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = write_lines(tmp_path / "test.jsonl", {"text": "a"})
    assert not open_in(tmp_path, path)[0].is_held_out
    assert "test.jsonl: read for training, since it was given by itself, although" in caplog.text


@dataclass(frozen=True)
class Unknown:
    id: str
    name: str
    content: bytes
    kind: str
    """Of the rows; or the error."""


UNKNOWN = [
    Unknown("lines", "data", b'\xef\xbb\xbf\n{"text": "a"}\n{"text": "b"}\n', "json lines"),
    Unknown("array", "data.dat", b'[{"text": "a"}]', "json array"),
    Unknown("pretty", "data.x", b'[\n  {"text": "a"}\n]', "json array"),
    Unknown(
        "text", "notes.xyz", b"Hello", "expected a suffix that says what it holds, got .xyz. Fix"
    ),
    Unknown("no_suffix", "README", b"Hello", "got none. Fix: rename it to .txt if it is one text"),
    Unknown("braces", "a.tpl", b"{{ template }}\n", "expected a suffix that says what it holds"),
    Unknown("brackets", "a.tpl", b"[section]\na = 1\n", "expected a suffix that says what it"),
    Unknown("binary", "a.bin", b"\0\1\2", "got binary. Fix: convert or unpack it first"),
    Unknown("latin", "a.tpl", b"caf\xe9", "got binary. Fix: convert or unpack it first"),
    Unknown("archive", "a.zip", b"PK\3\4\0\0\xff", "got binary. Fix: convert or unpack it first"),
    Unknown("empty", "a.dat", b"", "expected a suffix that says what it holds, got .dat"),
]


@pytest.mark.parametrize("case", UNKNOWN, ids=lambda case: case.id)
def test_an_unknown_suffix_is_told_by_content_or_refused(
    case: Unknown, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / case.name
    path.write_bytes(case.content)
    error = error_of(lambda: open_in(tmp_path, path))
    if error:
        assert error.startswith(f"InputError: {path}: expected ")
        assert case.kind in error
    else:
        assert open_in(tmp_path, path)[0].kind == case.kind
        assert f"{path}: read as {case.kind}, which its first bytes are" in caplog.text


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".jsonl"])
def test_a_known_file_without_its_suffix_is_read(kind: str, suffix: str, tmp_path: Path) -> None:
    path = fill(tmp_path, f"data{kind}") / f"data{kind}"
    path = pack(path, suffix) if suffix else path
    path = path.rename(tmp_path / "data")
    assert fields_of(tmp_path, path) == [{"text": f"data{kind}"}]


def test_paths_without_a_file_are_refused(tmp_path: Path) -> None:
    for name in ("gone.jsonl", "gone", "data/train.jsonl", "data/train.csv.gz", "squad"):
        with pytest.raises(MissingError, match=f"{name}: no such file or folder"):
            open_in(tmp_path, name)
    with pytest.raises(MissingError, match=r"gone\.jsonl: no such file or folder"):
        list_files([tmp_path / "gone.jsonl"])
    (tmp_path / "empty").mkdir()
    for call in (
        lambda: list_files([tmp_path / "empty"]),
        lambda: open_in(tmp_path, tmp_path / "empty"),
    ):
        with pytest.raises(InputError, match="expected a folder with files in it, found none"):
            call()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="got a pipe or device"):
        open_in(tmp_path, tmp_path / "pipe")


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    path = write_lines(folder / "data.jsonl", {"text": "a"})
    for call in (lambda: list_files([folder, path]), lambda: open_in(tmp_path, [folder, path])):
        with pytest.raises(InputError, match=r"data\.jsonl: given more than once"):
            call()


def test_a_file_of_equal_content_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [write_lines(tmp_path / name, {"text": "a"}) for name in ("a.jsonl", "b.jsonl")]
    for name in ("c.txt", "d.txt"):
        (tmp_path / name).touch()
        paths.append(tmp_path / name)
    names = [source.name for source in open_in(tmp_path, paths)]
    assert names == [str(paths[0]), str(paths[2]), str(paths[3])]
    assert f"{paths[1]}: left out: its content is that of {paths[0]}" in caplog.text


def test_a_folder_is_its_files_at_any_depth_in_order_without_hidden_ones(tmp_path: Path) -> None:
    fill(tmp_path, "b.txt", "a/z.txt", "a/c/d.txt", ".git/config", "a/.hidden")
    names = [path.relative_to(tmp_path).as_posix() for path in list_files([tmp_path])]
    assert names == ["a/c/d.txt", "a/z.txt", "b.txt"]


def test_a_file_is_described_by_name_size_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"abc")
    assert describe_file(path) == {
        "name": "data.txt",
        "bytes": 3,
        "sha256": hashlib.sha256(b"abc").hexdigest(),
    }
    with pytest.raises(InputError, match=r"gone: cannot be read: No such file"):
        describe_file(tmp_path / "gone")


def test_columns_are_read_under_other_names(tmp_path: Path) -> None:
    rows = [{"body": "a", "text": "no", "n": 1}, {"text": "no"}]
    path = write_lines(tmp_path / "data.jsonl", *rows)
    assert fields_of(tmp_path, path, "text=body") == [{"text": "a", "n": 1}, {}]
    swapped = write_lines(tmp_path / "swap.jsonl", {"prompt": "a", "completion": "b"})
    assert fields_of(tmp_path, swapped, "prompt=completion", "completion=prompt") == [
        {"prompt": "b", "completion": "a"}
    ]
    late = [{"text": "no"}, {"body": "a"}]  # as a Dataset whose first row holds a null
    assert fields_of(tmp_path, late, "text=body") == [{}, {"text": "a"}]
    (source,) = open_in(tmp_path, path, "text=body")
    assert (source.columns, source.expected) == ({"text": "body"}, "text")


def test_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "a.csv", "b.jsonl", "c.parquet", "d.md")
    for name in ("a.csv", "b.jsonl", "c.parquet", "d.md"):
        with pytest.raises(
            InputError,
            match=rf"{name}: column body: expected one of text, got none\. Fix: --column text=NAME",
        ):
            open_in(tmp_path, tmp_path / name, "text=body")
    with pytest.raises(InputError, match="^rows: column body: expected one of messages, id, got"):
        open_in(tmp_path, ROWS, "text=body")
    for item, got in [("body", "'body'"), ("=body", "'=body'"), ("text=", "'text='")]:
        with pytest.raises(InputError, match=f"column: expected FIELD=COLUMN, got {got}"):
            open_in(tmp_path, ROWS, item)
    with pytest.raises(InputError, match="got a second column for text"):
        open_in(tmp_path, ROWS, "text=a", "text=b")


CSV = [
    (
        "quoted_lines",
        b'id,text\n1,"a\r\nb"\n2,c\n',
        [{"id": "1", "text": "a\r\nb"}, {"id": "2", "text": "c"}],
    ),
    (
        "no_guesses",
        b"id,text\n007,NA\n1e3,null\n",
        [{"id": "007", "text": "NA"}, {"id": "1e3", "text": "null"}],
    ),
    ("empty_cells", b'id,text\n,a\n2,""\n', [{"id": None, "text": "a"}, {"id": "2", "text": None}]),
    ("bom_and_blank_lines", b"\xef\xbb\xbftext\r\n\r\na\r\n\r\nb", [{"text": "a"}, {"text": "b"}]),
    ("only_names", b"id,text\n", []),
    ("long_cell", b"text\n" + b"x" * 300_000 + b"\n", [{"text": "x" * 300_000}]),
]


@pytest.mark.parametrize(("name", "content", "rows"), CSV, ids=[case[0] for case in CSV])
def test_cells_of_csv_are_texts(
    name: str, content: bytes, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.csv"
    path.write_bytes(content)
    assert fields_of(tmp_path, path) == rows


BAD_CSV = [
    (b"", r":1: expected a line with the names of columns, got none"),
    (b"a,a\n1,2\n", r":1: .* got columns that share a name"),
    (b'a,b\n1,"x\ny"\n1,2,3\n', r":4: expected 2 cells \(a, b\), got 3\. Fix: quote cells"),
    (b"a,b\n1\n", r":2: expected 2 cells \(a, b\), got 1"),
    (b'a\n"x\ny\n', r":3: expected CSV, got unexpected end of data"),
    (b'a,b\n"x"y,1\n', r":2: expected CSV, got "),
    (b"a\nx\n\xff\n", r": expected UTF-8, got the byte 0xff after line "),
]


@pytest.mark.parametrize(("content", "message"), BAD_CSV, ids=range(len(BAD_CSV)))
def test_bad_csv_is_refused_with_the_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"data\.csv" + message):
        open_in(tmp_path, path)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "title"), [(".parquet", "a Parquet file"), (".arrow", "an Arrow file")]
)
def test_a_file_that_is_no_table_is_refused(kind: str, title: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{kind}"
    for content in (b"not a table at all", b"", b"PAR1" + b"\0" * 50 + b"PAR1", b"ARROW1"):
        path.write_bytes(content)
        message = error_of(lambda: open_in(tmp_path, path))
        assert message.startswith(f"InputError: {path}: expected {title}, got: ")
        assert "\n" not in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_parquet_of_categories_and_streams_of_arrow_are_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "data.parquet"
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array(["a", "b"]).dictionary_encode()}), path
    )
    assert fields_of(tmp_path, path) == [{"text": "a"}, {"text": "b"}]
    stream = write_table(tmp_path / "data.stream.arrow", [{"text": "c"}])
    assert fields_of(tmp_path, stream) == [{"text": "c"}]
    nested = [{"messages": [{"role": "user", "content": "hi"}]}, {"messages": None}]
    assert fields_of(tmp_path, write_table(tmp_path / "chat.parquet", nested)) == nested


def test_a_row_of_a_table_that_is_not_utf8_is_bad(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    cells = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": cells}), tmp_path / "data.parquet")
    rows = read_all(open_in(tmp_path, tmp_path / "data.parquet"))
    assert [getattr(row, "problem", "") for row in rows] == [
        "",
        "expected UTF-8, got the byte 0xff",
        "",
    ]
    assert rows[1].where == f"{tmp_path / 'data.parquet'} row 2"


def test_a_configuration_is_for_data_on_the_hub(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "a"})
    with pytest.raises(InputError, match="data_config: expected data on the hub, got files for en"):
        open_sources(path, DataSettings(data_config="en"), folder=tmp_path / "cache")


def test_links_to_folders_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = fill(tmp_path / "data", "a.jsonl")
    (folder / "again").symlink_to(folder)
    assert len(open_in(tmp_path, folder)) == 1
    assert f"{folder / 'again'}: left out: links to folders are not followed" in caplog.text


def test_a_table_is_made_once(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a" / "data.parquet", TABLE)
    (source,) = open_in(tmp_path, path)
    stamp = (source.path / "rows.arrow").stat().st_mtime_ns
    moved = path.rename(tmp_path / "moved.parquet")
    (again,) = open_in(tmp_path, moved)
    assert again.path == source.path
    assert (again.path / "rows.arrow").stat().st_mtime_ns == stamp
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [source.path.name]


def test_two_processes_that_make_one_table_both_find_it_whole(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "table"
    listed = '{"files": [], "rows": [], "bytes": []}'
    for first, second in [(listed, listed), ("damaged", listed)]:
        with _whole_table(target) as slow:
            (slow / "table.json").write_text(second)
            with _whole_table(target) as fast:
                (fast / "table.json").write_text(first)
        assert (target / "table.json").read_text() == listed
        assert list(target.parent.iterdir()) == [target]
        (target / "table.json").unlink()


def test_a_full_disk_and_a_stop_leave_no_half_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_table(tmp_path / "data.parquet", TABLE)

    def fail(error: BaseException) -> Any:  # noqa: ANN401
        def write(*_: object, **__: object) -> None:
            raise error

        return write

    for error, seen in [
        (OSError(28, "No space left on device"), DiskFullError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr("carryon.cache.corpus.reading.tables._write_batches", fail(error))
            patch.setattr("carryon.cache.corpus.reading.spool._line_of", fail(error))
            for data in (path, ROWS):
                with pytest.raises(seen):
                    open_in(tmp_path, data)
        assert list((tmp_path / "cache").iterdir()) == []
    assert len(fields_of(tmp_path, path)) == 3


def test_rows_in_memory_are_read_as_json_lines_are(tmp_path: Path) -> None:
    digests = set()
    for data in (ROWS, iter(ROWS), (dict(row) for row in ROWS), tuple(ROWS)):
        (source,) = open_in(tmp_path, data)
        rows = [row for row in read_all([source]) if isinstance(row, Row)]
        assert [row.fields for row in rows] == ROWS
        assert [row.where for row in rows] == ["row 1", "row 2", "row 3"]
        assert [row.made_id for row in rows][:1] == [f"rows-{source.sha256[:8]}-1"]
        assert (source.name, source.expected) == ("rows", "messages")
        digests.add(source.path)
    assert len(digests) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_values_of_other_libraries_become_plain_ones(tmp_path: Path) -> None:
    row = {
        "a": np.int64(3),
        "b": np.array([[1.5]]),
        "c": (1, 2),
        "d": datetime.datetime(2026, 1, 2),
        "text": "\ud800",
    }
    assert fields_of(tmp_path, [row]) == [
        {"a": 3, "b": [[1.5]], "c": [1, 2], "d": "2026-01-02T00:00:00", "text": "\ud800"}
    ]


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (b"x", "bytes"),
        ({1}, "set"),
        (float("nan"), "nan"),
        (np.float32("inf"), "Out of range float values"),
        (int, "type"),
        (object(), "object"),
    ],
)
def test_a_value_that_json_cannot_hold_is_refused(value: object, got: str, tmp_path: Path) -> None:
    data: Any = [{"text": "a"}, {"text": "b", "x": value}]
    with pytest.raises(
        InputError, match=f"^row 2: x: expected values that JSON can hold, got {got}"
    ):
        open_in(tmp_path, data)
    deep: Any = []
    for _ in range(sys.getrecursionlimit() * 10):
        deep = [deep]
    with pytest.raises(InputError, match="^row 1: x: .* got too deep nesting"):
        open_in(tmp_path, [{"x": deep}])
    assert list((tmp_path / "cache").iterdir()) == []


def test_data_of_other_types_are_refused(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "a.jsonl", {"text": "a"})
    for data, message in [
        ([{"text": "a"}, "b"], "^row 2: expected a dict, got str$"),
        ([3], "^row 1: expected a dict, got int$"),
        ([one, {"text": "a"}], "^data: expected paths only, got dict among them$"),
        (3, "^data: expected paths or rows, got int$"),
        ({"text": "a"}, r"^data: expected splits .* got text\. Fix: give a list with one row$"),
        ({}, r"^data: expected splits .* got none\. Fix"),
        (
            {"train_sft": ROWS},
            r"got train_sft\. Fix: give one split, as data\['train_sft'\], or a list",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            open_in(tmp_path, data)


def test_splits_in_memory_are_trained_or_held_out_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from datasets import Dataset, DatasetDict

    caplog.set_level(logging.INFO)
    train, test = [{"text": "a"}, {"text": "b"}], [{"text": "c"}]
    for make in (dict, DatasetDict):
        splits = {"train": Dataset.from_list(train), "validation": Dataset.from_list(test)}
        sources = open_in(tmp_path, make(splits))
        assert [(source.name, source.is_held_out) for source in sources] == [
            ("rows:train", False),
            ("rows:validation", True),
        ]
        rows = read_all(sources)
        assert [row.where for row in rows] == [
            "row 1 of train",
            "row 2 of train",
            "row 1 of validation",
        ]
        assert [row.fields for row in rows if isinstance(row, Row)] == train + test
    assert "rows:validation: held out for evaluation, as its name says" in caplog.text


def test_data_sets_in_memory_are_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    data = Dataset.from_list([{"text": str(number)} for number in range(5)])
    assert fields_of(tmp_path, data.select([3, 1])) == [{"text": "3"}, {"text": "1"}]
    assert fields_of(tmp_path, data.to_iterable_dataset()) == list(data)
    assert fields_of(tmp_path, data.with_format("numpy")) == list(data)


def test_saved_data_sets_are_read_where_they_are(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{"messages": [{"role": "user", "content": str(n)}], "n": n} for n in range(10)]
    data = Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one", num_shards=3)
    (source,) = open_in(tmp_path, tmp_path / "one")
    assert (source.kind, source.name) == ("table", str(tmp_path / "one"))
    assert fields_of(tmp_path, tmp_path / "one") == rows
    assert not list(source.path.glob("*.arrow"))

    halves = DatasetDict({"train": data.select(range(6)), "test": data.select(range(6, 10))})
    halves.save_to_disk(tmp_path / "two" / "saved")
    for folder in (tmp_path / "two", tmp_path / "two" / "saved"):
        sources = open_in(tmp_path, folder)
        found = {Path(source.name).name: source.is_held_out for source in sources}
        assert found == {"test": True, "train": False}
    assert fields_of(tmp_path, f"{folder}:train") == rows[:6]
    DatasetDict({"train_sft": data}).save_to_disk(tmp_path / "three")
    with pytest.raises(InputError, match=r"got train_sft\. Fix: give .*three:train_sft$"):
        open_in(tmp_path, tmp_path / "three")
    assert fields_of(tmp_path, f"{tmp_path / 'three'}:train_sft") == rows
    with pytest.raises(InputError, match="expected a folder with splits, got one data set"):
        open_in(tmp_path, f"{tmp_path / 'one'}:train")


def test_columns_of_json_are_decoded_and_those_of_images_left_alone(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Image, Json, Value

    columns = {"text": ["a", "b"], "m": [{"x": 1}, [1, "q"]], "i": [None, {"bytes": b"no image"}]}
    kinds = Features({"text": Value("string"), "m": Json(), "i": Image()})
    data = Dataset.from_dict(columns, features=kinds)
    data.save_to_disk(tmp_path / "saved")
    data.to_parquet(tmp_path / "data.parquet")
    for name in ("saved", "data.parquet"):
        rows = fields_of(tmp_path, tmp_path / name)
        assert rows == [{"text": "a", "m": {"x": 1}}, {"text": "b", "m": [1, "q"]}]


@pytest.mark.parametrize(
    "state", ["{", "[]", '{"_data_files": []}', '{"_data_files": [{"filename": "../x.arrow"}]}']
)
def test_a_damaged_saved_data_set_is_refused(state: str, tmp_path: Path) -> None:
    from datasets import Dataset

    folder = tmp_path / "one"
    Dataset.from_list([{"text": "a"}]).save_to_disk(folder)
    (folder / "state.json").write_text(state)
    with pytest.raises(InputError, match=r"one: expected a saved data set, got a damaged state"):
        open_in(tmp_path, folder)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a/b", HubName("a", "", "")),
        (
            "HuggingFaceH4/ultrachat_200k:train_sft",
            HubName("HuggingFaceH4/ultrachat_200k", "", "train_sft"),
        ),
        ("a/b@v1.0:test", HubName("a/b", "v1.0", "test")),
        ("a/b@refs/pr/1", HubName("a/b", "refs/pr/1", "")),
        ("squad", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("/a/b", None),
        ("a/b.jsonl", None),
        ("a/../b", None),
        ("a/b:", None),
    ],
)
def test_names_on_the_hub_are_told_from_paths(text: str, name: HubName | None) -> None:
    assert parse_hub_name(text) == (HubName("a/b", "", "") if text == "a/b" else name)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Empty cache of the hub, and no connection to it."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield tmp_path / "hub"
    assert datasets.config.HF_HUB_OFFLINE is True


@pytest.mark.usefixtures("hub_cache")
def test_a_data_set_that_is_nowhere_is_missed_in_one_line(tmp_path: Path) -> None:
    message = error_of(lambda: open_in(tmp_path, "carryon-test/no_such_data@main:train"))
    assert message.startswith(
        "MissingError: carryon-test/no_such_data@main: expected a file, folder or data set on the "
        "hub, got none: the hub cannot be reached, and its cache does not hold it. Fix: "
    )
    assert "\n" not in message


def test_a_data_set_in_the_cache_of_the_hub_is_read(
    hub_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from datasets import load_dataset

    caplog.set_level(logging.INFO)
    splits = {}
    for split in ("train", "test"):
        splits[split] = str(write_lines(tmp_path / f"{split}.jsonl", {"text": f"{split} text"}))
    load_dataset("json", data_files=splits, cache_dir=str(tmp_path / "made"))
    (built,) = (tmp_path / "made" / "json").glob("*/*/*/dataset_info.json")
    target = hub_cache / "some___chats" / "default" / "0.0.0" / "abc123"
    target.parent.mkdir(parents=True)
    built.parent.rename(target)
    for file in target.glob("json-*.arrow"):
        file.rename(target / file.name.replace("json-", "chats-"))

    sources = open_in(tmp_path, "some/chats")
    assert [(source.name, source.is_held_out) for source in sources] == [
        ("some/chats:train", False),
        ("some/chats:test", True),
    ]
    assert len({source.sha256 for source in sources}) == 2
    rows = [row for row in read_all(sources) if isinstance(row, Row)]
    assert [row.fields for row in rows] == [{"text": "train text"}, {"text": "test text"}]
    assert rows[0].where == "some/chats:train row 1"
    assert "some/chats:test: held out for evaluation, as its name says" in caplog.text
    assert open_in(tmp_path, "some/chats:test")[0] == sources[1]
    with pytest.raises(InputError, match="got train, test|got test, train"):
        open_in(tmp_path, "some/chats:dev")
    with pytest.raises(MissingError, match=r"some/chats@v2: expected .* the cache holds abc123"):
        open_in(tmp_path, "some/chats@v2")


def test_a_folder_has_priority_over_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "some" / "chats", "a.jsonl")
    (source,) = open_sources("some/chats", DataSettings(), folder=tmp_path / "cache")
    assert source.name == "some/chats/a.jsonl"


@pytest.mark.parametrize("content", ["[" * 100_000, "3", '{"_data_files": 5}', "\0"])
def test_a_saved_set_whose_state_is_mangled_is_one_line(tmp_path: Path, content: str) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "data.arrow").touch()
    (saved / "state.json").write_text(content)
    with pytest.raises(InputError, match="expected a saved data set, got a damaged") as caught:
        open_sources(saved, DataSettings(), folder=tmp_path / "cache")
    assert "\n" not in str(caught.value)
