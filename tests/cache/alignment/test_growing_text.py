"""A text that grows byte by byte against the tokens of each beginning in aligned extraction."""

import random

import pytest
from support.aligned_tokenizers import TEXTS, make_tokenizer

from carryon.cache.alignment.boundaries import read_rules
from carryon.cache.alignment.growing_text import GrowingText, begin_text, end_prompt, grow
from carryon.cache.alignment.prefixes import PrefixTokenizer
from carryon.cache.corpus.tokenize import Encoder

KINDS = ["gpt2", "qwen", "o200k", "metaspace", "gemma"]
NFC = [text.replace("a\u0308", "\u00e4").replace("q\u0323", "q") for text in TEXTS]


def make(kind: str) -> PrefixTokenizer:
    """Return a tokenizer of beginnings."""
    encoder = Encoder(make_tokenizer(kind))
    return PrefixTokenizer(encoder, read_rules(encoder, name=kind))


def facts(text: GrowingText) -> tuple[list[int], int, str]:
    """Return what both ways know."""
    return list(text.tokens), text.num_stable, text.tail


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_next", [False, True])
def test_each_beginning_has_the_tokens_of_aligned_extraction(kind: str, is_next: bool) -> None:
    text = "".join(NFC)
    prefixes = make(kind).tokenize(text, range(1, len(text) + 1), is_next=is_next)
    growing = end_prompt(begin_text(())) if is_next else begin_text(())
    tokenizer = make(kind)
    for end in range(1, len(text) + 1):
        prefix = prefixes.at(end)
        growing = grow(growing, text[end - 1].encode(), tokenizer)
        expected = [*prefixes.tokens[: prefix.num_shared].tolist(), *prefix.others]
        tail = text[prefix.stable_end : end]
        assert facts(growing) == (expected, prefix.num_stable, tail), text[max(end - 20, 0) : end]
        assert growing.num_covered == len(tail.encode())


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_in_which_a_text_grows_do_not_matter(kind: str) -> None:
    draw, tokenizer = random.Random(0), make(kind)
    data = "".join(NFC).encode()
    one = begin_text((7,))
    while data:
        size = draw.choice([1, 1, 2, 3, 9])
        one, data = grow(one, data[:size], tokenizer), data[size:]
    assert one == grow(begin_text((7,)), "".join(NFC).encode(), tokenizer)
    assert one.tokens[0] == 7


def test_a_character_that_is_begun_is_not_read_yet() -> None:
    tokenizer = make("qwen")
    text = grow(begin_text(()), b"a", tokenizer)
    begun = grow(text, "\U0001f600".encode()[:3], tokenizer)
    assert (begun.tokens, len(begun.partial), begun.num_covered) == (text.tokens, 3, 4)
    whole = grow(begun, "\U0001f600".encode()[3:], tokenizer)
    assert whole == grow(text, "\U0001f600".encode(), tokenizer)
    wrong = grow(begun, b"b", tokenizer)
    assert wrong == grow(text, "\ufffdb".encode(), tokenizer)


def test_no_token_reaches_out_of_a_prompt() -> None:
    tokenizer = make("gpt2")
    text = end_prompt(grow(begin_text(()), b"The qui", tokenizer))
    more = grow(text, b"ck", tokenizer)
    assert more.tokens[: len(text.tokens)] == text.tokens
    assert more.tokens != grow(begin_text(()), b"The quick", tokenizer).tokens
