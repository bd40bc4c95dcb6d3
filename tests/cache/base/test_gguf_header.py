"""Headers of .gguf files that claim more than the file holds."""

import struct
from pathlib import Path

import pytest
from support.tiny_bases import write_tiny_gguf

from carryon.cache.base.loading import read_config
from carryon.cache.base.source.gguf_header import check_gguf
from carryon.cache.base.source.location import locate_base
from carryon.cache.errors import InputError

UINT8, UINT32, STRING, LIST, UINT64 = 0, 4, 8, 9, 10
HEADER_BYTES = 24  # magic, version, and the numbers of tensors and of entries


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _entry(name: bytes, kind: int, value: bytes) -> bytes:
    return _string(name) + struct.pack("<I", kind) + value


def _file(path: Path, *entries: bytes, tensors: int = 0, count: int | None = None) -> Path:
    number = len(entries) if count is None else count
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, number) + b"".join(entries))
    return path


def _list(item: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, count) + values


LIES = {
    "a list of numbers": [_entry(b"a", LIST, _list(UINT32, 1 << 60))],
    "one number too many": [_entry(b"a", LIST, _list(UINT32, 3, bytes(11)))],
    "a list of strings": [_entry(b"a", LIST, _list(STRING, 1 << 60))],
    "a string": [_entry(b"a", STRING, struct.pack("<Q", 1 << 62))],
    "a name": [struct.pack("<Q", (1 << 64) - 1)],
    "a list in lists": [_entry(b"a", LIST, _list(LIST, 1) * 5000)],
    "an unknown type": [_entry(b"a", 13, bytes(8))],
    "a number": [_entry(b"a", UINT64, bytes(7))],
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_claims_more_than_the_file_is_refused(name: str, tmp_path: Path) -> None:
    path = _file(tmp_path / "odd.gguf", *LIES[name])
    with pytest.raises(InputError, match="expected a header that ends within the file of"):
        locate_base(str(path))


def test_more_entries_than_there_are_and_more_blocks_than_tensors_are_refused(
    tmp_path: Path,
) -> None:
    path = _file(tmp_path / "odd.gguf", count=1 << 60)
    with pytest.raises(InputError, match="ends within"):
        check_gguf(path)
    blocks = _entry(b"llama.block_count", UINT32, struct.pack("<I", 1 << 31))
    few = _entry(b"llama.block_count", UINT32, struct.pack("<I", 2))
    for entries in ([blocks], [blocks, few], [few, blocks]):
        with pytest.raises(InputError, match="expected at most 7 blocks, .*, got 2,147,483,648"):
            check_gguf(_file(path, *entries, tensors=7))
    check_gguf(_file(path, few, tensors=7))


@pytest.mark.parametrize(
    ("kind", "value"),
    [(UINT64, struct.pack("<Q", 1 << 40)), (LIST, _list(UINT32, 1, struct.pack("<I", 1 << 31)))],
)
def test_blocks_are_counted_in_the_type_of_the_format(
    kind: int, value: bytes, tmp_path: Path
) -> None:
    path = _file(tmp_path / "odd.gguf", _entry(b"llama.block_count", kind, value), tensors=7)
    with pytest.raises(InputError, match="expected a block_count of type 4 .uint32., got type"):
        check_gguf(path)


def test_a_sound_header_is_accepted_and_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    lists = _entry(b"a", LIST, _list(LIST, 1, _list(UINT8, 3, bytes(3))))
    path = _file(tmp_path / "sound.gguf", lists, _entry(b"b", 7, b"x"))
    assert locate_base(str(path)).gguf_file == path.name
    whole = path.read_bytes()
    for size in range(HEADER_BYTES, len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=f"ends within the file of {size} bytes"):
            locate_base(str(path))


def test_a_file_of_the_package_gguf_is_accepted_until_it_has_more_blocks_than_tensors(
    tmp_path: Path,
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    assert locate_base(str(path)).gguf_file == path.name
    content = path.read_bytes()
    name = content.index(b"block_count") + len(b"block_count")
    assert content[name : name + 8] == struct.pack("<II", UINT32, 1)
    path.write_bytes(content[: name + 4] + struct.pack("<I", 13) + content[name + 8 :])
    with pytest.raises(InputError, match="expected at most 11 blocks, .*, got 13"):
        locate_base(str(path))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"none" + bytes(100)])
def test_what_is_no_gguf_file_at_all_is_left_to_its_reader(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "none.gguf").write_bytes(content)
    source = locate_base(str(tmp_path / "none.gguf"))
    assert source.gguf_file == "none.gguf"
    with pytest.raises(InputError, match="its config could not be loaded"):
        read_config(source)
