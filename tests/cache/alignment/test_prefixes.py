"""Tokens of beginnings of texts against the tokenizer itself, and against later edits."""

import random

import numpy as np
import pytest
from support.aligned_tokenizers import TEXTS, make_tokenizer
from tokenizers import Regex, pre_tokenizers

from carryon.cache.alignment.boundaries import read_rules
from carryon.cache.alignment.prefixes import PrefixTokenizer
from carryon.cache.alignment.tree import grow_tree
from carryon.cache.corpus.tokenize import Encoder
from carryon.cache.errors import InputError

KINDS = ["gpt2", "qwen", "o200k", "camel", "metaspace", "gemma"]
SPLICES = [*"aZ7'\n\t <,(", "  ", "'s", "'ll", "\r\n", " \n ", "\u4f60", "\U0001f600", "im_start|>"]
SPLICES += ["XMLH", "ttp", "\u306e", "Ab"]


def make_text(draw: random.Random, *, is_nfc: bool) -> str:
    """Return parts of the texts and splices, in any order."""
    parts = []
    for _ in range(draw.randint(3, 9)):
        text = draw.choice(TEXTS)
        start = draw.randrange(len(text))
        parts += [text[start : start + draw.randint(1, 25)], draw.choice(SPLICES)]
    text = "".join(parts)
    return text.replace("\u0308", "").replace("\u0323", "") if is_nfc else text


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_every_beginning_are_those_of_the_text_alone(kind: str) -> None:
    encoder = Encoder(make_tokenizer(kind))
    rules = read_rules(encoder, name=kind)
    tokenizer = PrefixTokenizer(encoder, rules)
    draw = random.Random(0)
    for _ in range(12):
        text = make_text(draw, is_nfc=rules.is_nfc)
        made = tokenizer.tokenize(text, range(1, len(text) + 1), is_next=False)
        for end in range(1, len(text) + 1):
            prefix = made.at(end)
            got = [*made.tokens[: prefix.num_shared].tolist(), *prefix.others]
            assert got == encoder.encode(text[:end]).ids.tolist(), (text, end)


@pytest.mark.parametrize("kind", KINDS)
def test_stable_tokens_stay_whatever_follows(kind: str) -> None:
    encoder = Encoder(make_tokenizer(kind))
    rules = read_rules(encoder, name=kind)
    tokenizer = PrefixTokenizer(encoder, rules)
    draw = random.Random(1)
    for _ in range(40):
        text = make_text(draw, is_nfc=rules.is_nfc)
        end = draw.randint(1, len(text))
        facts = []
        for _ in range(4):
            other = text[:end] + make_text(draw, is_nfc=rules.is_nfc)[draw.randrange(4) :]
            made = tokenizer.tokenize(other, [end, len(other)], is_next=False)
            prefix = made.at(end)
            stable = made.tokens[: prefix.num_stable].tolist()
            facts.append((stable, prefix.stable_end, prefix.num_stable))
        assert all(fact == facts[0] for fact in facts), (text[:end], facts)


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "o200k", "camel"])
@pytest.mark.parametrize(
    "known",
    [
        *("XMLH", "fooBAR", "\u306eA", "\u306eAB", "\u306eABC", " x\u306eA", "\u306e'"),
        *("they'", "they'l", "they'v", "WE'R", " 'l"),
    ],
)
def test_letters_decide_nothing_before_those_that_they_may_belong_to(kind: str, known: str) -> None:
    encoder = Encoder(make_tokenizer(kind))
    tokenizer = PrefixTokenizer(encoder, read_rules(encoder, name=kind))
    facts = []
    for more in ("b", "bc d", "B", "Bc", " ", "7", "\u306e", "'s", "s", "l", "lx", "e", "E"):
        text = known + more
        facts.append(stable_within(text, len(known), tokenizer, encoder))
    assert all(fact == facts[0] for fact in facts), facts


def stable_within(
    text: str, end: int, tokenizer: PrefixTokenizer, encoder: Encoder
) -> tuple[list[int], int]:
    """Check every beginning of a text; return the stable tokens of one, and where they end."""
    made = tokenizer.tokenize(text, range(1, len(text) + 1), is_next=False)
    for each in range(1, len(text) + 1):
        prefix = made.at(each)
        got = [*made.tokens[: prefix.num_shared].tolist(), *prefix.others]
        assert got == encoder.encode(text[:each]).ids.tolist(), (text, each)
    prefix = made.at(end)
    return made.tokens[: prefix.num_stable].tolist(), prefix.stable_end


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_within_a_begun_added_token_is_stable(kind: str) -> None:
    encoder = Encoder(make_tokenizer(kind))
    tokenizer = PrefixTokenizer(encoder, read_rules(encoder, name=kind))
    name = "<|im_start|>"
    for before in ("say ", "x", ""):
        for length in range(1, len(name)):
            known = before + name[:length]
            facts = []
            for text in (before + name + "x", known + " y", known):
                made = tokenizer.tokenize(text, [len(known), len(text)], is_next=False)
                prefix = made.at(len(known))
                facts.append((made.tokens[: prefix.num_stable].tolist(), prefix.stable_end))
            assert facts[0] == facts[1] == facts[2], (known, facts)
            assert facts[0][1] <= len(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blanks", ["", " ", "  ", "\t\t", "\t\t\t", "\n\n  ", "\n\n\n", " \n "])
def test_blanks_before_a_begun_added_token_are_one_piece_if_it_is_one(
    kind: str, blanks: str
) -> None:
    encoder = Encoder(make_tokenizer(kind))
    tokenizer = PrefixTokenizer(encoder, read_rules(encoder, name=kind))
    name = "<|im_start|>"
    for length in range(1, len(name)):
        known = f"usage:{blanks}{name[:length]}"
        facts = []
        for text in (f"usage:{blanks}{name}'re", known + " y", known + "file>", known):
            facts.append(stable_within(text, len(known), tokenizer, encoder))
        assert all(fact == facts[0] for fact in facts), (known, facts)


@pytest.mark.parametrize("kind", ["metaspace", "gemma"])
def test_the_sign_of_a_blank_joins_tokens_as_a_blank_does(kind: str) -> None:
    encoder = Encoder(make_tokenizer(kind))
    tokenizer = PrefixTokenizer(encoder, read_rules(encoder, name=kind))
    text = "\u4e00\u30a2    \U0001f3f49\u2581the\u2581def B\u2581The"
    made = tokenizer.tokenize(text, range(1, len(text) + 1), is_next=False)
    for end in range(1, len(text) + 1):
        prefix = made.at(end)
        got = [*made.tokens[: prefix.num_shared].tolist(), *prefix.others]
        assert got == encoder.encode(text[:end]).ids.tolist(), (text, end)


def test_a_beginning_of_which_the_vocabulary_has_no_byte_has_no_token() -> None:
    encoder = Encoder(make_tokenizer("lossy"))
    tokenizer = PrefixTokenizer(encoder, read_rules(encoder, name="b"))
    made = tokenizer.tokenize("\x04\x06ab", range(1, 5), is_next=False)
    assert made.tokens.tolist() == encoder.encode("ab").ids.tolist()
    assert [made.num_shared[row] + len(made.at(row + 1).others) for row in range(4)][:3] == [
        0,
        0,
        1,
    ]
    alone = tokenizer.tokenize("\x04", [1], is_next=True)
    assert (alone.tokens.tolist(), alone.num_stable.tolist()) == ([], [0])
    assert tokenizer.tail("\x04", is_next=True).ids == ()


def make_split(*patterns: str) -> Encoder:
    """Return a byte-level tokenizer whose text is cut by patterns, one after the other."""
    made = make_tokenizer("gpt2")
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return Encoder(made)


def test_numbers_that_are_no_digits_are_grouped_from_the_right_too() -> None:
    encoder = make_split(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))|\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
    tokenizer = PrefixTokenizer(encoder, read_rules(encoder, name="b"))
    for known in ("x\xbd12", "x 12\xbd34", "x\u2167\u2167\u2167\u2167"):
        facts = []
        for more in ("", "5", "56", "567 y", "\xbd"):
            made = tokenizer.tokenize(known + more, [len(known), len(known + more)], is_next=False)
            prefix = made.at(len(known))
            facts.append((made.tokens[: prefix.num_stable].tolist(), prefix.stable_end))
        assert all(fact == facts[0] for fact in facts), (known, facts)


@pytest.mark.parametrize("kind", KINDS)
def test_most_stable_boundaries_are_near_the_end(kind: str) -> None:
    encoder = Encoder(make_tokenizer(kind))
    tokenizer = PrefixTokenizer(encoder, read_rules(encoder, name=kind))
    text = TEXTS[0] + TEXTS[1]
    made = tokenizer.tokenize(text, range(1, len(text)), is_next=False)
    assert (made.ends - made.stable_end).mean() < 8


def test_tokenizers_that_cannot_be_aligned_are_refused_by_name() -> None:
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    lower = make_tokenizer("gpt2")
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0)], 0))
    words = make_split(r"\d{1,3}(?=(?:\d{3})*\b)", r"\s+(?!\S)|\s+|\S+")._first
    cases = [
        (
            PreTrainedTokenizerFast(tokenizer_object=words),
            "blanks before digits as the letter behind them says",
        ),
        (lower, "normalizer of the kind Lowercase"),
        (PreTrainedTokenizerFast(tokenizer_object=unigram), "kind Unigram"),
    ]
    for tokenizer, problem in cases:
        with pytest.raises(InputError, match=problem):
            read_rules(Encoder(tokenizer), name="base b")


def test_a_sample_that_ends_before_any_text_of_the_other_base_has_no_tree() -> None:
    encoder = Encoder(make_tokenizer("qwen"))
    tokenizer = PrefixTokenizer(encoder, read_rules(encoder, name="b"))
    zeros = np.zeros(3, dtype=np.int64)
    start = np.array([7], dtype=np.int32)
    tree = grow_tree("abc", (1,), zeros, zeros.astype(np.int32), start=start, tokenizer=tokenizer)
    assert tree.tokens.tolist() == [7]
    assert tree.exact.tolist() == tree.stable.tolist() == [0, 0, 0]
    assert tree.covered.tolist() == [0, 0, 0]
