"""Places from the bytes of tokens are those of the tokenizer."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_tokenizers import KINDS, Kind, make_chat_tokenizer
from tokenizers import normalizers

from carryon.cache.corpus.byte_offsets import count_bytes, find_places

BYTE_LEVEL: list[Kind] = ["bytes", "gpt2", "llama3"]
TOKENIZERS = {
    kind: make_chat_tokenizer(
        kind, "", special=["<s>", "</s>"], added=["<think>"]
    ).backend_tokenizer
    for kind in KINDS
}


@settings(deadline=None)
@given(
    st.sampled_from(BYTE_LEVEL),
    st.lists(st.text("a H\n.\u00e9\u0301\u4f60\U0001f600") | st.sampled_from(["<s>", "<think>"])),
)
def test_places_are_the_offsets_of_the_tokenizer(kind: Kind, parts: list[str]) -> None:
    backend, text = TOKENIZERS[kind], "".join(parts)
    counts = count_bytes(json.loads(backend.to_str()), backend.get_added_tokens_decoder())
    assert counts is not None
    encoding = backend.encode(text, add_special_tokens=False)
    places = find_places(text, np.array(encoding.ids, dtype=np.int32), counts)
    is_normal = text == normalizers.NFC().normalize_str(text)
    assert (places is not None) or not is_normal
    if places is not None:
        assert list(zip(*(each.tolist() for each in places), strict=True)) == encoding.offsets


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BYTE_LEVEL])
def test_tokens_that_are_no_pieces_of_the_text_have_no_number_of_bytes(kind: Kind) -> None:
    backend = TOKENIZERS[kind]
    assert count_bytes(json.loads(backend.to_str()), backend.get_added_tokens_decoder()) is None


def test_tokens_that_do_not_add_up_to_the_text_have_no_places() -> None:
    counts = np.array([1, 2], dtype=np.int32)
    assert find_places("abcd", np.array([0, 1], dtype=np.int32), counts) is None
    assert find_places("abc", np.array([1, 7], dtype=np.int32), counts) is None
    assert find_places("e\u0301", np.array([0, 1], dtype=np.int32), counts) is None
