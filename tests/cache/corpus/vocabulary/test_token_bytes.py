"""Bytes of the tokens of tokenizers of several kinds."""

import os
from pathlib import Path

import pytest
from support.chat_tokenizers import KINDS, Kind, make_chat_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from carryon.cache.corpus.vocabulary.token_bytes import digest_bytes, token_bytes
from carryon.cache.errors import InputError

TEXT = "  An\tapple\n\n d'\u00e9t\u00e9 \u65e5\u672c \U0001f600\u0301 x = {1: 20}\n"


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_a_texts_tokens_are_the_text(kind: Kind) -> None:
    tokenizer = make_chat_tokenizer(kind, "", special=["<s>"], added=["\n\n"])
    found = token_bytes(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]

    text = b"".join(found[number] or b"" for number in ids).decode()
    # SentencePiece's put a blank before a text, and after an added token
    assert text.replace(" ", "") == TEXT.replace(" ", "")
    if kind in ("bytes", "gpt2", "llama3"):
        assert text == TEXT


def test_special_tokens_have_no_bytes_and_other_added_ones_theirs() -> None:
    tokenizer = make_chat_tokenizer("gpt2", "", special=["<s>"], added=["\n\n", "<tool>"])
    found = token_bytes(tokenizer)

    assert found[tokenizer.convert_tokens_to_ids("<s>")] is None
    assert found[tokenizer.convert_tokens_to_ids("\n\n")] == b"\n\n"
    assert found[tokenizer.convert_tokens_to_ids("<tool>")] == b"<tool>"


def test_bytes_that_fall_back_and_blanks_are_theirs() -> None:
    tokenizer = make_chat_tokenizer("metaspace_first", "", special=["<s>"], added=["\u2581\u2581"])
    found = token_bytes(tokenizer)

    assert found[tokenizer.convert_tokens_to_ids("<0x0A>")] == b"\n"
    assert found[tokenizer.convert_tokens_to_ids("<0xE2>")] == b"\xe2"
    assert found[tokenizer.convert_tokens_to_ids("\u2581")] == b" "
    assert found[tokenizer.convert_tokens_to_ids("\u2581\u2581")] == b"  "


def test_there_are_as_many_as_rows_of_the_head() -> None:
    tokenizer = make_chat_tokenizer("bytes", "", special=["<s>"])
    found = token_bytes(tokenizer)

    assert token_bytes(tokenizer, vocab_size=len(found) + 3) == (*found, None, None, None)
    assert token_bytes(tokenizer, vocab_size=5) == found[:5]


def test_unigram_tokens_are_read_by_their_places() -> None:
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("\u2581a", -1.0), ("b", -2.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken("<unk>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)

    assert token_bytes(tokenizer)[:3] == (None, b" a", b"b")


def test_tokens_that_are_no_bytes_of_a_text_are_refused() -> None:
    vocabulary = {"[UNK]": 0, "a": 1, "##b": 2}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.name_or_path = "words"

    with pytest.raises(
        InputError, match="tokenizer 'words': expected byte-level BPE or SentencePiece.*WordPiece"
    ):
        token_bytes(tokenizer)


def test_a_suffix_at_the_end_of_words_is_refused() -> None:
    backend = Tokenizer(models.BPE(vocab={"a</w>": 0}, merges=[], end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()

    with pytest.raises(InputError, match="expected byte-level BPE"):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_the_digest_tells_where_a_token_ends() -> None:
    assert digest_bytes([b"ab", b"c"]) != digest_bytes([b"a", b"bc"])
    assert digest_bytes([None, b"a"]) != digest_bytes([b"", b"a"])


@pytest.mark.real
@pytest.mark.parametrize("variable", ["CARRYON_SMOLLM2", "CARRYON_QWEN"])
def test_real_tokenizers_are_spelled_byte_for_byte(variable: str) -> None:
    folder = os.environ.get(variable)
    if folder is None or not (Path(folder) / "tokenizer.json").exists():
        pytest.skip(f"set {variable} to a folder with its tokenizer.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = token_bytes(tokenizer)
    text = TEXT.replace("\u0301", "") * 3 + Path(__file__).read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    assert b"".join(found[number] or b"" for number in ids).decode() == text
    assert {bytes([byte]) for byte in range(32, 127)} <= set(found)
