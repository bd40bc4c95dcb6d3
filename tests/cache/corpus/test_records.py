"""Data as records: files, and rows in memory."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.tiny_stores import error_of

from carryon.cache.corpus.files import describe_file, list_files, open_data, read_files
from carryon.cache.corpus.records import (
    MAX_ID_BYTES,
    Record,
    check_id,
    read_records,
    refuse_shared_texts,
)
from carryon.cache.errors import InputError, MissingError


def test_each_line_of_a_json_file_is_a_record(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl",
        {"messages": [{"role": "user", "content": "hi"}], "id": "first"},
        {"prompt": "a", "completion": "b", "split": "held-out", "other": [1, 2]},
        {"text": "c", "id": 7, "split": "train"},
    )
    records = list(read_records(read_files([path])))
    assert [record.content for record in records] == [
        [{"role": "user", "content": "hi"}],
        ("a", "b"),
        "c",
    ]
    assert [record.id for record in records] == ["first", "data-2", "7"]
    assert [record.is_held_out for record in records] == [False, True, False]
    assert [record.where for record in records] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert sum(record.num_bytes for record in records) == path.stat().st_size


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert [(record.id, text_of(record)) for record in read_records(read_files([path]))] == [
        ("data-1", "a"),
        ("data-4", "b"),
    ]


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    text = "a\u2028b\x85c"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [text_of(record) for record in read_records(read_files([path]))] == [text]


def test_null_fields_count_as_absent(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl",
        {"messages": None, "prompt": "a", "completion": None, "text": "b", "id": None},
    )
    (record,) = read_records(read_files([path]))
    assert (record.id, record.content) == ("data-1", "b")


def test_messages_have_priority_over_prompt_and_text(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    both = {"prompt": "a", "completion": "b", "text": "c"}
    path = write_lines(tmp_path / "data.jsonl", {**both, "messages": messages}, both)
    assert [type(record.content) for record in read_records(read_files([path]))] == [list, tuple]


def test_parquet_rows_are_read_as_json_lines_are(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"messages": [{"role": "user", "content": "hi", "name": None}], "text": None, "n": 1},
        {"messages": None, "text": "b", "n": 2},
    ]
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    records = list(read_records(read_files([path])))
    assert [record.content for record in records] == [
        [{"role": "user", "content": "hi"}],
        "b",
    ]
    assert [record.id for record in records] == ["data-1", "data-2"]
    assert records[1].where == f"{path} row 2"


def test_a_parquet_file_without_known_columns_is_refused(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"question": ["a"], "answer": ["b"]}), path)
    with pytest.raises(InputError, match=r"data\.parquet row 1: .*got question, answer"):
        list(read_records(read_files([path])))


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "data.parquet"
    path.write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match=r"data\.parquet: expected a Parquet file"):
        list(read_records(read_files([path])))


def test_any_other_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_bytes("# T\u00eate\r\n".encode())
    (record,) = read_records(read_files([path]))
    assert (record.id, record.where) == ("notes", str(path))
    assert text_of(record) == "# T\u00eate\r\n"


def test_an_empty_text_file_holds_no_record(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.touch()
    assert list(read_records(read_files([path]))) == []


@dataclass(frozen=True)
class BadLine:
    id: str
    line: str
    message: str


BAD_LINES = [
    BadLine("cut_off", '{"text":', r"got malformed JSON: Expecting value at column 9$"),
    BadLine("bad_byte", "\udcff", r"got malformed JSON: 'utf-8' codec can't decode byte 0xff"),
    BadLine("too_deep", "[" * 100_000, r"got malformed JSON: "),
    BadLine("list", "[1]", r"expected one JSON object a line, got list"),
    BadLine("no_field", '{"a": 1, "b": 2}', r"expected messages, .* or text, got a, b$"),
    BadLine("no_completion", '{"prompt": "a"}', r"got prompt$"),
    BadLine("nothing", "{}", r"got nothing$"),
    BadLine("text_kind", '{"text": 3}', r"text: expected a string, got int"),
    BadLine("prompt_kind", '{"prompt": [], "completion": "a"}', r"prompt: .*, got list"),
    BadLine("messages_kind", '{"messages": "a"}', r"messages: expected a list .*, got str"),
    BadLine("no_messages", '{"messages": []}', r"messages: .*, got an empty list"),
    BadLine("message_kind", '{"messages": ["a"]}', r"messages\[0\]: expected role .*, got str"),
    BadLine("no_content", '{"messages": [{"role": "a"}]}', r"\[0\]: content: .*, got none"),
    BadLine(
        "content_kind",
        '{"messages": [{"role": "a", "content": "b"}, {"role": "a", "content": [1]}]}',
        r"messages\[1\]: content: expected a string, got list",
    ),
    BadLine("id_kind", '{"text": "a", "id": true}', r"id: expected .* whole number, got bool"),
    BadLine("id_empty", '{"text": "a", "id": ""}', r"id: expected 1 to 255 bytes, got 0"),
    BadLine("split", '{"text": "a", "split": "test"}', r"expected .*'held-out', got 'test'"),
]


@pytest.mark.parametrize("case", BAD_LINES, ids=lambda case: case.id)
def test_a_bad_line_is_named_with_its_number(case: BadLine, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + case.line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(InputError, match=rf"data\.jsonl:2: .*{case.message}"):
        list(read_records(read_files([path])))


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.gz"
    path.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"data\.gz: expected .* UTF-8 text, .* at 2: .* unpack"):
        list(read_records(read_files([path])))


def test_an_id_given_twice_is_refused_with_both_places(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", {"text": "a", "id": "x"})
    second = write_lines(tmp_path / "b.jsonl", {"text": "a"}, {"text": "b", "id": "x"})
    with pytest.raises(
        InputError, match=r"b\.jsonl:2: id: .* got 'x', which is also that of .*a\.jsonl:1\."
    ):
        list(read_records(read_files([first, second])))


def test_made_ids_are_unique_among_files_of_one_name(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "data.jsonl", {"text": "a"})
        (tmp_path / folder / "notes.txt").write_text("a", encoding="utf-8")
    ids = [record.id for record in read_records(read_files(list_files([tmp_path])))]
    assert ids == ["data-1", "notes", "data-1~2", "notes~2"]


def test_made_ids_of_long_file_names_fit(tmp_path: Path) -> None:
    path = write_lines(tmp_path / ("\u00e9" * 120 + ".jsonl"), {"text": "a"})
    (record,) = read_records(read_files([path]))
    assert record.id == "\u00e9" * 107 + "-1"
    assert len(record.id.encode()) <= MAX_ID_BYTES


@pytest.mark.parametrize(
    ("identifier", "problem"),
    [
        ("a", ""),
        ("\u00e9" * 127 + "a", ""),
        ("\u00e9" * 128, "expected 1 to 255 bytes, got 256"),
        ("a\0", r"expected no NUL character, got 'a\x00'"),
        ("\ud800", r"expected valid Unicode, got '\ud800'"),
    ],
)
def test_ids_that_cannot_be_stored_are_refused(identifier: str, problem: str) -> None:
    expected = f"InputError: x: {problem}" if problem else ""
    assert error_of(lambda: check_id(identifier, where="x")) == expected


def test_a_folder_is_its_files_at_any_depth_in_order_without_hidden_ones(
    tmp_path: Path,
) -> None:
    for name in ("b.txt", "a/z.txt", "a/c/d.txt", ".git/config", "a/.hidden"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = [path.relative_to(tmp_path).as_posix() for path in list_files([tmp_path])]
    assert names == ["a/c/d.txt", "a/z.txt", "b.txt"]


def test_paths_without_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"gone\.jsonl: no such file or folder"):
        list_files([tmp_path / "gone.jsonl"])
    with pytest.raises(InputError, match="expected a folder with files in it, found none"):
        list_files([tmp_path])


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "a"})
    with pytest.raises(InputError, match=r"data\.jsonl: given more than once"):
        list_files([tmp_path, path])


def test_a_file_is_described_by_name_size_and_digest(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes(b"abc")
    assert describe_file(path) == {
        "name": "data.txt",
        "bytes": 3,
        "sha256": hashlib.sha256(b"abc").hexdigest(),
    }


ROWS = [
    {"messages": [{"role": "user", "content": "hi"}], "id": "first"},
    {"prompt": "a", "completion": "b", "split": "held-out", "other": [1, 2]},
    {"text": "c", "id": 7},
]


def test_rows_in_memory_are_records_as_json_lines_are(tmp_path: Path) -> None:
    from_file = list(read_records(open_data(write_lines(tmp_path / "row.jsonl", *ROWS))[1]))
    for data in (ROWS, iter(ROWS), (dict(row) for row in ROWS)):
        files, rows = open_data(data)
        records = list(read_records(rows))
        assert files == []
        assert [record.where for record in records] == ["row 1", "row 2", "row 3"]
        for record, same in zip(records, from_file, strict=True):
            assert (record.id, record.content) == (same.id, same.content)
            assert record.is_held_out == same.is_held_out
            assert record.num_bytes > 0


def test_a_bad_row_is_named_with_its_number() -> None:
    with pytest.raises(InputError, match=r"^row 2: prompt: expected a string, got int$"):
        list(read_records(open_data([{"text": "a"}, {"prompt": 1, "completion": "b"}])[1]))
    rows: list[Any] = [{"text": "a"}, "b"]
    with pytest.raises(InputError, match="^row 2: expected a dict, got str$"):
        list(open_data(rows)[1])


def test_a_mapping_of_splits_is_refused_by_their_names() -> None:
    splits: Any = {"train": ROWS, "test": ROWS}
    with pytest.raises(InputError, match=r"got one mapping\. Fix: give .* splits \(train, test\)"):
        open_data(splits)


def test_data_may_be_one_path_or_several(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", *ROWS)
    for data in (path, str(path), [path], (str(path),), tmp_path):
        files, rows = open_data(data)
        assert [file["name"] for file in files] == ["data.jsonl"]
        assert [row.fields for row in rows] == ROWS


def write_lines(path: Path, *rows: dict[str, Any]) -> Path:
    """Write `rows` as JSON lines and return `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_of(record: Record) -> str:
    """Return the text of a record that is a document."""
    assert isinstance(record.content, str)
    return record.content


def test_equal_texts_in_both_halves_are_refused() -> None:
    train = [
        {"id": "a", "text": "one"},
        {"id": "b", "messages": [{"role": "user", "content": "x"}]},
    ]
    held_out = [{"id": "c", "text": "two", "split": "held-out"}, {"id": "d", "text": "three"}]
    refuse_shared_texts(train, held_out)
    held_out += [{"id": "e", "text": "one"}, {"id": "f", "text": "one"}]
    with pytest.raises(InputError, match="got 2 that are equal, the first is e"):
        refuse_shared_texts(train, held_out)
