"""Vocabularies on disk: read once, and again when a byte was changed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.mixed_stores import make_anchor
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.cache.files.documents import sealed, write_json
from carryon.cache.files.tensor_files import digest_tensors
from carryon.cache.store.reader import Store
from carryon.train.mixing.sources import Vocabulary
from carryon.train.mixing.vocabulary_cache import Words, cached_words

BASE = {"id": "b", "revision": None, "weights_sha256": "w", "tokenizer_sha256": "t"}
TOKENS = [b"a", None, b"", b"\xe4\xbd", b"bc"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CARRYON_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept" / "vocabularies"


class Counted:
    """A reading that is counted."""

    def __init__(self) -> None:
        """Begin at none."""
        self.calls = 0

    def __call__(self) -> Words:
        """Return the same vocabulary each time."""
        self.calls += 1
        return TOKENS, [1, 4]


def test_a_vocabulary_is_read_once_for_a_base(folder: Path) -> None:
    read = Counted()
    for _ in range(3):
        tokens, stops = cached_words(BASE, vocab_size=5, compute=read)
        assert list(tokens) == TOKENS
        assert list(stops) == [1, 4]
    assert read.calls == 1
    for name in BASE:
        cached_words(BASE | {name: "other"}, vocab_size=5, compute=read)
    assert read.calls == 1 + len(BASE)


def test_a_changed_byte_is_found_and_the_tokenizer_read_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read = Counted()
    cached_words(BASE, vocab_size=5, compute=read)
    for path in sorted(folder.rglob("vocabulary.*")):
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with caplog.at_level(logging.WARNING):
            tokens, _ = cached_words(BASE, vocab_size=5, compute=read)
        assert "the cached vocabulary is computed again" in caplog.text
        assert list(tokens) == TOKENS
        caplog.clear()
    assert read.calls == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda each: each | {"lengths": each["lengths"][:4].clone()},
        lambda each: each | {"lengths": each["lengths"] * 1000},
        lambda each: each | {"lengths": each["lengths"] - 1},
        lambda each: each | {"lengths": each["lengths"].long()},
        lambda each: each | {"data": each["data"][1:].clone()},
        lambda each: each | {"stops": torch.tensor([5])},
        lambda each: each | {"stops": torch.tensor([-1])},
        lambda each: each | {"more": torch.zeros(1)},
        lambda each: each | {"settings": torch.zeros(0, dtype=torch.int64)},
    ],
)
def test_what_no_vocabulary_is_is_read_again_whoever_signed_it(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    read = Counted()
    cached_words(BASE, vocab_size=5, compute=read)
    [path] = folder.rglob("vocabulary.safetensors")
    save_file(change(load_file(path)), path)
    key = {**BASE, "vocab_size": 5, "rule": 2}
    receipt = sealed({"key": key, "files": {path.name: digest_tensors(path)}})
    write_json(path.with_suffix(".json"), receipt)
    with caplog.at_level(logging.WARNING):
        tokens, stops = cached_words(BASE, vocab_size=5, compute=read)
    assert read.calls == 2, caplog.text
    assert list(tokens) == TOKENS
    assert list(stops) == [1, 4]


def test_a_store_opens_without_its_base_once_its_tokenizer_was_read(
    folder: Path, tmp_path: Path
) -> None:
    store = Store.open(make_anchor(tmp_path))
    first = Vocabulary.read(store)
    (tmp_path / "anchor-base").rename(tmp_path / "elsewhere")
    again = Vocabulary.read(store)
    assert list(again.tokens) == list(first.tokens)
    assert list(again.stops) == list(first.stops)
    for path in folder.iterdir():
        path.rename(path.with_name("0" * 64))
    with pytest.raises(InputError, match="expected the tokenizer of its base"):
        Vocabulary.read(store)


def test_tokens_that_end_a_turn_are_read_again_when_the_base_is_edited(
    folder: Path, tmp_path: Path
) -> None:
    store = Store.open(make_anchor(tmp_path))
    first = Vocabulary.read(store)
    path = tmp_path / "anchor-base" / "generation_config.json"
    before = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    for token in (7, 8, 9):
        if token == 8:  # as in the hub's cache
            path.unlink()
            path.symlink_to(tmp_path / "linked.json")
        path.write_text(json.dumps({"eos_token_id": [1, token]}))
        assert sorted(Vocabulary.read(store).stops) == sorted({*first.stops, token})
    path.unlink() if before is None else path.write_bytes(before)
    assert list(Vocabulary.read(store).stops) == list(first.stops)
