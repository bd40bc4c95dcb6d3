"""A base in a .gguf file as a folder: the same base, written atomically."""

import json
import logging
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from support.tiny_bases import make_tiny_base, write_tiny_gguf

from carryon.cache.base.conversion import convert_base
from carryon.cache.base.facts import read_facts
from carryon.cache.base.loading import CONVERSION
from carryon.cache.base.model import load_base
from carryon.cache.errors import InputError, MissingError
from carryon.cache.extraction.pipeline import extract
from carryon.cache.settings import ForwardSettings

FLOAT32 = ForwardSettings(device="cpu", compute_dtype="float32")
ROWS = [{"id": f"r{n}", "text": "the an the cat " * (n + 1)} for n in range(4)]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def folder(gguf: Path) -> Path:
    out = gguf.parent / "folder"
    convert_base(gguf, out=out)
    return out


def test_folder_and_file_are_one_base(gguf: Path, folder: Path) -> None:
    file, converted = (load_base(str(path), forward=FLOAT32).identity for path in (gguf, folder))
    assert converted.to_dict() | {"id": file.id} == file.to_dict()
    before, after = read_facts(str(gguf)), read_facts(str(folder))
    assert after.end_tokens == before.end_tokens
    assert (after.vocab_size, after.context_tokens) == (before.vocab_size, before.context_tokens)


@pytest.mark.parametrize("is_file_first", [True, False])
def test_a_store_of_one_is_resumed_with_the_other(
    gguf: Path, folder: Path, tmp_path: Path, is_file_first: bool
) -> None:
    bases = (gguf, folder) if is_file_first else (folder, gguf)
    out = tmp_path / "store"
    stores = [
        extract(base=str(base), data=ROWS, out=out, unit_tokens=128, forward=FLOAT32)
        for base in bases
    ]
    assert stores[0].fingerprint == stores[1].fingerprint


def test_the_report_tells_digests_and_size(gguf: Path, tmp_path: Path) -> None:
    report = convert_base(gguf, out=tmp_path / "new")
    identity = load_base(str(gguf), forward=FLOAT32).identity
    assert report["weights_sha256"] == identity.weights_sha256
    assert report["bytes"] == sum(p.stat().st_size for p in (tmp_path / "new").iterdir())
    assert report["parameters"] > 0


def test_steps_are_logged(gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="carryon"):
        convert_base(gguf, out=tmp_path / "new")
    steps = [line for line in caplog.messages if line.startswith("convert ")]
    assert [line[8:11] for line in steps] == ["1/4", "2/4", "3/4", "4/4"]
    assert not any("carryon convert" in line for line in caplog.messages)


def test_other_bases_and_full_folders_are_refused(gguf: Path, tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    with pytest.raises(InputError, match=r"expected a \.gguf file, got a base that needs no"):
        convert_base(base, out=tmp_path / "out")
    with pytest.raises(MissingError):
        convert_base(tmp_path / "none.gguf", out=tmp_path / "out")
    with pytest.raises(InputError, match="expected a new or empty folder"):
        convert_base(gguf, out=base)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_gguf_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "odd.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError):
        convert_base(tmp_path / "odd.gguf", out=tmp_path / "out")
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_the_tokenizer_file_is_read_as_it_is(folder: Path, gguf: Path) -> None:
    # transformers gives every tokenizer of a Qwen an NFC normalizer; this one has none
    config = (folder / "config.json").read_text()
    text = "the cafe\u0301"
    try:
        (folder / "config.json").write_text(config.replace('"llama"', '"qwen2"'))
        converted = read_facts(str(folder)).tokenizer
        assert converted.backend_tokenizer.normalizer is None
        assert converted(text).input_ids == read_facts(str(gguf)).tokenizer(text).input_ids
        (folder / CONVERSION).rename(folder / "away")
        assert read_facts(str(folder)).tokenizer.backend_tokenizer.normalizer is not None
    finally:
        (folder / "config.json").write_text(config)
        if (folder / "away").exists():
            (folder / "away").rename(folder / CONVERSION)


def test_a_gguf_file_in_a_converted_folder_is_read_as_one(
    folder: Path, gguf: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "both")
    shutil.copy(gguf, tmp_path / "both")
    alone, beside = (
        load_base(str(each), forward=FLOAT32) for each in (gguf, tmp_path / "both" / gguf.name)
    )
    assert beside.identity.to_dict() | {"id": ""} == alone.identity.to_dict() | {"id": ""}
    assert type(beside.tokenizer) is type(alone.tokenizer)


def without_normalizer(folder: Path) -> Path:
    """Return a copy of a tiny base whose tokenizer has an NFC normalizer, without it."""
    other = folder.with_name("plain")
    shutil.copytree(folder, other)
    path = other / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": None}))
    return other


@pytest.mark.parametrize("is_normalized_first", [True, False])
def test_a_base_that_differs_in_its_normalizer_is_known_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_normalized_first: bool
) -> None:
    nfc = make_tiny_base(tmp_path / "nfc")
    path = nfc / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    plain = without_normalizer(nfc)
    first, second = (nfc, plain) if is_normalized_first else (plain, nfc)
    rows = [*ROWS, {"id": "composed", "text": "the cafe\u0301"}]
    options = {"data": rows, "out": tmp_path / "store", "unit_tokens": 128, "forward": FLOAT32}
    store = extract(base=str(first), **options)
    with caplog.at_level(logging.INFO, logger="carryon"):
        again = extract(base=str(second), **options)
    assert again.fingerprint == store.fingerprint
    assert any("only in its normalizer" in line for line in caplog.messages)
    expected = store.base["tokenizer_sha256"]
    assert load_base(str(first), forward=FLOAT32).identity.tokenizer_sha256 == expected
    assert load_base(str(second), forward=FLOAT32).identity.tokenizer_sha256 != expected
    found = load_base(str(second), forward=FLOAT32, like=expected)
    assert found.identity.tokenizer_sha256 == expected


def test_a_tokenizer_that_differs_in_more_is_not_known(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    digest = load_base(str(base), forward=FLOAT32).identity.tokenizer_sha256
    path = base / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["model"]["merges"].pop()
    path.write_text(json.dumps(rules | {"normalizer": {"type": "NFC"}}))
    other = load_base(str(base), forward=FLOAT32, like=digest)
    assert other.identity.tokenizer_sha256 != digest


def test_commands_that_load_the_file_say_once_how_to_load_it_fast(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tiny_gguf(tmp_path / "said.gguf")
    with caplog.at_level(logging.INFO, logger="carryon"):
        read_facts(str(path))
        load_base(str(path), forward=FLOAT32)
    said = [line for line in caplog.messages if "carryon convert" in line]
    assert len(said) == 1
    assert f"carryon convert {path} --out FOLDER" in said[0]


def test_after_a_kill_nothing_has_the_name_and_the_command_works_again(
    gguf: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    context = multiprocessing.get_context("fork")  # nothing is imported again
    process = context.Process(target=convert_base, args=(gguf,), kwargs={"out": out})
    process.start()
    partial = tmp_path / ".out.partial"
    while process.is_alive() and not (partial / "tokenizer.json").exists():
        time.sleep(0.001)
    assert process.is_alive(), "it ended before it could be killed"
    process.kill()
    process.join()
    assert not out.exists()
    assert partial.exists()
    convert_base(gguf, out=out)
    assert not partial.exists()
    tokens = load_base(str(out), forward=FLOAT32).tokenizer("the an").input_ids
    assert np.array(tokens).size
