"""Shards, and the rows that are read from them."""

import hashlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from support.corpus_files import fields_of, open_in, pack, read_all, write_lines, write_table
from support.tiny_stores import error_of

from carryon.cache.corpus import files
from carryon.cache.corpus.files import plan_shards, read_shard, scan_file
from carryon.cache.corpus.reading import batches, json_rows
from carryon.cache.corpus.reading.json_rows import iter_values
from carryon.cache.corpus.rows import BadRow, Row, Shard, Source
from carryon.cache.errors import InputError

QUICK = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROWS: list[dict[str, Any]] = [{"text": f"text {number}", "n": number} for number in range(200)]


def bad_rows(rows: list[Row | BadRow]) -> list[tuple[str, str]]:
    """Return where and problem of each bad row."""
    return [(row.where, row.problem) for row in rows if isinstance(row, BadRow)]


def lines_source(path: Path, *, packing: str = "", shard_bytes: int = files.SHARD_BYTES) -> Source:
    """Return a file of JSON lines as a source."""
    scan = scan_file(path, has_lines=not packing, shard_bytes=shard_bytes)
    return Source(
        name=str(path),
        kind="json lines",
        path=path,
        packing=packing,
        num_bytes=scan.num_bytes,
        sha256=scan.sha256,
        is_held_out=False,
        columns={},
        expected="text",
        marks=scan.marks,
    )


def test_rows_of_json_lines_keep_their_line_and_size(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "a"}, {"text": "b", "id": "x"})
    rows = read_all(open_in(tmp_path, path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert rows == [
        Row(
            fields={"text": "a"},
            where=f"{path}:1",
            made_id=f"data-{digest}-1",
            num_bytes=14,
            is_held_out=False,
            expected="text",
        ),
        Row(
            fields={"text": "b", "id": "x"},
            where=f"{path}:2",
            made_id=f"data-{digest}-2",
            num_bytes=25,
            is_held_out=False,
            expected="text",
        ),
    ]


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}')
    assert [(row.where, row) for row in read_all(open_in(tmp_path, path))] == [
        (f"{path}:{line}", row)
        for line, row in zip((1, 4), read_all(open_in(tmp_path, path)), strict=True)
    ]
    assert fields_of(tmp_path, path) == [{"text": "a"}, {"text": "b"}]


def test_a_line_ends_at_a_newline_only(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    text = "a\u2028b\x85c"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert fields_of(tmp_path, path) == [{"text": text}]


VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.text(max_size=8),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    rows=some.lists(some.dictionaries(some.text(max_size=8), VALUES, max_size=3), max_size=6),
    indent=some.sampled_from([None, 0, 2]),
    is_array=some.booleans(),
    chunk_bytes=some.integers(1, 40),
)
@QUICK
def test_elements_are_those_of_the_json_module(
    rows: list[dict[str, Any]], indent: int | None, is_array: bool, chunk_bytes: int
) -> None:
    text = json.dumps(rows, ensure_ascii=False, indent=indent)
    if not is_array:
        text = "\n".join(json.dumps(row, indent=indent) for row in rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("carryon.cache.corpus.reading.json_rows._CHUNK_BYTES", chunk_bytes)
        read = list(iter_values(io.BytesIO(text.encode("utf-8", "surrogatepass")), "data.json"))
    assert [value for value, _ in read] == rows


@dataclass(frozen=True)
class BadLine:
    id: str
    line: bytes
    problem: str


BAD_LINES = [
    BadLine("cut_off", b'{"text":', "got malformed JSON: Expecting value at column 9"),
    BadLine("bad_byte", b'{"text": "\xff"}', "expected UTF-8, got the byte 0xff at column 11"),
    BadLine("too_deep", b'{"text": ' + b"[" * 100_000, "got too deep nesting"),
    BadLine("list", b"[1]", "expected one JSON object a line, got list"),
    BadLine("number", b"7", "expected one JSON object a line, got int"),
    BadLine("nan", b'{"text": NaN}', "got malformed JSON: NaN is no JSON value"),
    BadLine("infinity", b'{"text": [-Infinity]}', "-Infinity is no JSON value"),
    BadLine("digits", b'{"text": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
    BadLine("two", b'{"text": "a"} {}', "got malformed JSON: Extra data at column 15"),
]


@pytest.mark.parametrize("case", BAD_LINES, ids=lambda case: case.id)
def test_a_bad_line_is_named_and_the_others_are_read(case: BadLine, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + case.line + b'\n{"text": "b"}\n')
    rows = read_all(open_in(tmp_path, path))
    ((where, problem),) = bad_rows(rows)
    assert where == f"{path}:2"
    assert case.problem in problem
    assert "\n" not in problem
    assert [row.fields["text"] for row in rows if isinstance(row, Row)] == ["a", "b"]


ARRAYS = [
    (json.dumps(ROWS), ROWS),
    (json.dumps(ROWS, indent=2), ROWS),
    ("\ufeff \n" + json.dumps(ROWS, indent=2) + "\r\n\n", ROWS),
    ("[]", []),
    ("[ ]\n", []),
    ("", []),
    (" \n", []),
    (json.dumps(ROWS[0], indent=2), ROWS[:1]),
    ("\n".join(json.dumps(row, indent=1) for row in ROWS), ROWS),
    ("\n".join(json.dumps(row) for row in ROWS), ROWS),
    (json.dumps(ROWS[0]), ROWS[:1]),
]


@pytest.mark.parametrize(("text", "rows"), ARRAYS, ids=range(len(ARRAYS)))
def test_json_is_read_as_an_array_an_object_or_lines(
    text: str, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carryon.cache.corpus.reading.json_rows._CHUNK_BYTES", 7)  # values are cut
    path = tmp_path / "data.json"
    path.write_text(text, encoding="utf-8")
    assert fields_of(tmp_path, path) == rows


def test_elements_of_an_array_keep_their_number_and_line(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[\n {"text": "a",\n  "n": "x\\n"},\n\n {"text": "b"}, 12, {"text": NaN}\n]')
    rows = read_all(open_in(tmp_path, path))
    assert [row.where for row in rows] == [
        f"{path} row 1 (line 2)",
        f"{path} row 2 (line 5)",
        f"{path} row 3 (line 5)",
        f"{path} row 4 (line 5)",
    ]
    assert [problem for _, problem in bad_rows(rows)] == [
        "expected a JSON object, got int",
        "expected a JSON object, got NaN, which is no JSON value",
    ]


BROKEN_ARRAYS = [
    ('[\n{"text": "a"},\n{"text": b}]', r":3: got malformed JSON: Expecting value"),
    ('[\n{"text": "a"}\n{"text": "b"}]', r":3: .* expected , or \] after an element"),
    ('[{"text": "a"},\n{"text": "b"}', r":2: got malformed JSON: the array has no end"),
    ('[{"text": "a"},\n{"text": "b', r":2: got malformed JSON: Unterminated string"),
    ('[{"text": "a"}]\n{}', r":2: .* expected the end of the file after the array"),
    ('[{"text": ' + "[" * 100_000, r":1: got malformed JSON: too deep nesting"),
    ('{\n"text": "a"', r":2: got malformed JSON: Expecting"),
    ("[{},]", r":1: got malformed JSON: "),
    ('[{"text": "a"},\n{"text": "\udcff"}]', r":2: expected UTF-8, got the byte 0xff"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN_ARRAYS, ids=range(len(BROKEN_ARRAYS)))
@pytest.mark.parametrize("chunk_bytes", [5, 1 << 20])
def test_a_broken_array_is_refused_with_the_line(
    text: str, message: str, chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("carryon.cache.corpus.reading.json_rows._CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "data.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"data\.json" + message) as raised:
        read_all(open_in(tmp_path, path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize(
    "kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"]
)
def test_every_kind_is_read_from_every_compression(kind: str, suffix: str, tmp_path: Path) -> None:
    rows = [{"text": "a\u00e9"}, {"text": 'b "c"\n,\td'}]
    path = tmp_path / f"data{kind}"
    if kind in (".parquet", ".arrow"):
        write_table(path, rows)
    elif kind in (".csv", ".tsv"):
        path.write_text('text\na\u00e9\n"b ""c""\n,\td"\n', "utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        write_lines(path, *rows)
    path = pack(path, suffix) if suffix else path
    (source,) = open_in(tmp_path, path)
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.facts == {
        "name": path.name,
        "bytes": path.stat().st_size,
        "sha256": source.sha256,
    }
    assert (source.name, source.is_held_out, source.expected) == (str(path), False, "text")
    read = read_all([source])
    assert [row.fields for row in read if isinstance(row, Row)] == rows
    assert [row.made_id for row in read if isinstance(row, Row)] == [
        f"data-{source.sha256[:8]}-{number}" for number in (1, 2)
    ]


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
def test_a_text_file_is_one_row(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_bytes("\ufeff# T\u00eate\r\n".encode())
    path = pack(path, suffix) if suffix else path
    (row,) = read_all(open_in(tmp_path, path))
    assert isinstance(row, Row)
    assert row.fields == {"text": "# T\u00eate\r\n"}
    assert row.where == str(path)
    assert row.made_id == f"notes-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    assert row.num_bytes == path.stat().st_size


def test_an_empty_text_holds_no_row(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert read_all(open_in(tmp_path, tmp_path / "empty.txt")) == []


def test_a_text_that_is_not_utf8_is_a_bad_row_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"ab\xff")
    assert bad_rows(read_all(open_in(tmp_path, path))) == [
        (str(path), "expected UTF-8 text, got the byte 0xff at 2. Fix: convert or unpack it first")
    ]


def test_the_name_of_a_file_that_is_no_unicode_makes_a_valid_id(tmp_path: Path) -> None:
    path = tmp_path / "a\udcff.txt"
    path.write_text("a")
    (row,) = read_all(open_in(tmp_path, path))
    assert isinstance(row, Row)
    assert row.made_id.startswith("a?-")


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_damaged_compressed_file_is_refused(suffix: str, tmp_path: Path) -> None:
    path = pack(write_lines(tmp_path / "data.jsonl", *ROWS), suffix)
    path.write_bytes(path.read_bytes()[:-30])
    message = error_of(lambda: read_all(open_in(tmp_path, path)))
    assert f"InputError: {path}: cannot be read: " in message
    assert "\n" not in message
    path.write_bytes(b"plain")
    message = error_of(lambda: open_in(tmp_path, path))
    assert f"{path}: expected a file compressed as {suffix[1:]}, got other bytes. Fix" in message


def test_joined_compressed_files_are_read_to_the_end(tmp_path: Path) -> None:
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        path = pack(write_lines(tmp_path / "data.jsonl", *ROWS[:2]), suffix)
        path.write_bytes(path.read_bytes() * 2)
        assert fields_of(tmp_path, path) == ROWS[:2] * 2


@given(
    texts=some.lists(some.text(max_size=30), max_size=30),
    shard_bytes=some.integers(1, 200),
    block_bytes=some.integers(1, 64),
    ends=some.sampled_from(["\n", "\r\n", "\n\n", "\n \n"]),
    has_last_end=some.booleans(),
)
@QUICK
def test_shards_joined_are_one_pass_over_the_lines(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    shard_bytes: int,
    block_bytes: int,
    ends: str,
    has_last_end: bool,
) -> None:
    path = tmp_path_factory.mktemp("lines") / "data.jsonl"
    lines = ends.join(json.dumps({"text": t}, ensure_ascii=False) for t in texts)
    path.write_bytes((lines + ends * has_last_end).encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_BLOCK_BYTES", block_bytes)
        source = lines_source(path, shard_bytes=shard_bytes)
    shards = plan_shards([source])
    whole = Shard(source=source, start=0, stop=source.num_bytes, first_number=1)
    assert read_all([source]) == list(read_shard(whole))
    assert all(shard.stop - shard.start >= shard_bytes for shard in shards[:-1])
    assert [shard.start for shard in shards[1:]] == [shard.stop for shard in shards[:-1]]


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.json"])
def test_strided_shards_give_every_row_once(name: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    if name == "data.json":
        path = tmp_path / name
        path.write_text(json.dumps(ROWS))
    else:
        path = pack(write_lines(path, *ROWS), ".gz")
    (source,) = open_in(tmp_path, path)
    assert [shard.of for shard in plan_shards([source])] == [1]
    whole = [row.where for row in read_all([source])]
    for size, of in [(5 << 19, 3), (1 << 40, 4 if name == "data.json" else 8)]:
        shards = plan_shards([replace(source, num_bytes=size)])
        assert [(shard.start, shard.of) for shard in shards] == [(at, of) for at in range(of)]
        parts = [[row.where for row in read_shard(shard)] for shard in shards]
        assert sorted(sum(parts, [])) == sorted(whole)
        assert [len(part) for part in parts[:3]] == ([72, 64, 64] if of == 3 else [64, 64, 64])
    progress = [row.num_bytes for row in read_all([source])]
    assert sum(progress) == pytest.approx(path.stat().st_size, abs=16)  # but for the end of gzip


def test_tables_are_cut_into_ranges_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_table(tmp_path / "data.parquet", ROWS)
    monkeypatch.setattr("carryon.cache.corpus.files.SHARD_BYTES", 1000)
    (source,) = open_in(tmp_path, path)
    shards = plan_shards([source])
    assert len(shards) > 3
    assert all(shard.source.marks == ((200, 201),) for shard in shards)  # small to send
    rows = read_all([source])
    assert [row.fields for row in rows if isinstance(row, Row)] == ROWS
    assert [row.where for row in rows] == [f"{path} row {n}" for n in range(1, 201)]
    assert {row.num_bytes for row in rows} == {path.stat().st_size // 200}


def test_the_index_of_a_large_file_is_small(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 26)  # a hole: NULs without a line
    assert len(scan_file(path, has_lines=True).marks) == 2


def test_a_table_whose_cache_is_gone_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = write_table(tmp_path / "data.parquet", ROWS)
    (source,) = open_in(tmp_path, path)
    (source.path / "rows.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match=r"data\.parquet: expected an Arrow file, got"):
        read_all([source])
    assert fields_of(tmp_path, path) == ROWS  # opened again, it is made again


@pytest.mark.parametrize(
    ("name", "begin"), [("x.jsonl", b""), ("x.json", b'[{"text": "'), ("x.csv", b"text\n")]
)
def test_a_record_without_an_end_is_refused_and_not_read_into_memory(
    name: str, begin: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (files, json_rows, batches):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / name
    path.write_bytes(begin + b"x" * 5_000_000)
    with pytest.raises(InputError, match=r":[12]: expected records of less than"):
        read_all(open_in(tmp_path, [str(path)]))
