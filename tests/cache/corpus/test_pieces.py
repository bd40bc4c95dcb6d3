"""Tokens as text: prompt, targets, special tokens and stop tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_tokenizers import KINDS, Kind, make_chat_tokenizer
from support.tiny_bases import make_tiny_tokenizer

from carryon.cache.corpus.pieces import Piece, cut_pieces

TOKENIZER = make_tiny_tokenizer()
END = 2


def pieces_of(prompt: str, target: str) -> list[Piece]:
    """Return the pieces of a text after which another is learned."""
    first, then = (TOKENIZER(text, add_special_tokens=False).input_ids for text in (prompt, target))
    mask = [0] * len(first) + [1] * len(then)
    return cut_pieces(TOKENIZER, first + then, mask, end_tokens=[END])


def piece(text: str, *flags: str) -> Piece:
    """Return a piece that is what `flags` say."""
    names = ("is_target", "is_special", "is_stop")
    return Piece(text=text, **{name: name in flags for name in names})


def test_a_turn_shows_prompt_target_and_stop_token() -> None:
    assert pieces_of("<|im_start|>user\nthe<|im_end|>\n", "thing \u00e9<|im_end|>") == [
        piece("<|im_start|>", "is_special"),
        piece("user\nthe"),
        piece("<|im_end|>", "is_special"),
        piece("\n"),
        piece("thing \u00e9", "is_target"),
        piece("<|im_end|>", "is_target", "is_special", "is_stop"),
    ]


def test_special_tokens_in_a_row_stay_apart() -> None:
    names = ["<|im_start|>", "<|im_start|>", "<|im_end|>"]
    assert [each.text for each in pieces_of("".join(names), "")] == names


def test_a_character_whose_bytes_are_several_tokens_is_shown_as_one() -> None:
    assert pieces_of("", "\U0001f600") == [piece("\U0001f600", "is_target")]
    half = TOKENIZER("\u00e9").input_ids[:1]
    assert cut_pieces(TOKENIZER, half, [1]) == [piece("\ufffd", "is_target")]


@pytest.mark.parametrize("token", [-1, 271, 10**9])
def test_a_token_that_the_tokenizer_does_not_know_is_shown_by_its_number(token: int) -> None:
    a = TOKENIZER("a").input_ids
    assert cut_pieces(TOKENIZER, [*a, token, *a], [0, 0, 1]) == [
        piece("a"),
        piece(f"token {token}", "is_special"),
        piece("a", "is_target"),
    ]


def test_no_token_is_no_piece() -> None:
    assert cut_pieces(TOKENIZER, [], []) == []


@settings(deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.text("a <>s/.\u00e9\u4f60\n", max_size=5), st.booleans()), max_size=5),
)
def test_pieces_joined_are_the_decoded_tokens(kind: Kind, parts: list[tuple[str, bool]]) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens, mask = [], []
    for text, is_target in parts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        tokens += ids
        mask += [int(is_target)] * len(ids)
    pieces = cut_pieces(tokenizer, tokens, mask, end_tokens=tokenizer.all_special_ids)
    assert "".join(each.text for each in pieces) == tokenizer.decode(tokens)


TOKENIZERS = {
    kind: make_chat_tokenizer(kind, "", special=["<s>", "</s>"], bos="<s>", eos="</s>")
    for kind in KINDS
}
