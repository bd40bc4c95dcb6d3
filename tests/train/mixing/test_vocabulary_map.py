"""Which tokens of the anchor a token of the source stands for."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.spread_reference import project_plainly
from transformers import AutoTokenizer

from carryon.cache.corpus.vocabulary.token_bytes import token_bytes
from carryon.cache.errors import InputError
from carryon.train.mixing.vocabulary_map import Spread, VocabularyMap

TOKENS = st.lists(
    st.none() | st.binary(min_size=0, max_size=4).map(lambda b: bytes(97 + x % 3 for x in b)),
    min_size=1,
    max_size=14,
)

WORDS_AND_POINTS = st.lists(
    st.binary(min_size=0, max_size=5).map(lambda b: bytes(b"aab."[x % 4] for x in b)),
    min_size=1,
    max_size=14,
)


def make_map(
    source: list[bytes | None],
    anchor: list[bytes | None],
    source_stops: tuple[int, ...] = (),
    anchor_stops: tuple[int, ...] = (),
) -> VocabularyMap:
    return VocabularyMap(
        source=source, anchor=anchor, source_stops=source_stops, anchor_stops=anchor_stops
    )


def give(spread: Spread, source: list[float], anchor: list[float]) -> list[float]:
    """Return the mass that a spread gives to each token of the anchor."""
    held = [0.0] * (spread.num_groups + 1)
    own = [0.0] * spread.num_groups
    for token, place in zip(spread.sources, spread.places, strict=True):
        held[place] += source[token]
    for member, group in zip(spread.members, spread.groups, strict=True):
        own[group] += anchor[member]
    out = [held[-1] * each for each in anchor]
    for member, group in zip(spread.members, spread.groups, strict=True):
        out[member] += held[group] * anchor[member] / own[group]
    return out


def some_probabilities(count: int, seed: int) -> list[float]:
    weights = [1.0 + (7 * number + 3 * seed) % 11 for number in range(count)]
    return [each / sum(weights) for each in weights]


@settings(deadline=None, max_examples=150)
@given(source=TOKENS, anchor=TOKENS, covered=st.text("abc", max_size=3), seed=st.integers(0, 9))
def test_every_spread_is_that_of_the_plain_rule(
    source: list[bytes | None], anchor: list[bytes | None], covered: str, seed: int
) -> None:
    if not any(source) or not any(anchor):
        return
    stops = (0,) if any(source[1:]) and any(anchor[1:]) and seed % 2 else ()
    vocabulary_map = make_map(source, anchor, stops, stops)
    source_probs = some_probabilities(len(source), seed)
    anchor_probs = some_probabilities(len(anchor), seed + 1)
    spread = vocabulary_map.spread(covered.encode()) if covered else vocabulary_map.whole

    found = give(spread, source_probs, anchor_probs)

    expected = project_plainly(
        source_probs,
        anchor_probs,
        source,
        anchor,
        covered=covered.encode(),
        source_stops=stops,
        anchor_stops=stops,
    )
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_longer_token_goes_to_its_first_piece_and_a_shorter_is_split() -> None:
    source: list[bytes | None] = [b"the", b"international", b"t"]
    anchor: list[bytes | None] = [b"there", b"then", b"the", b"inter", b"in", b"to"]
    found = give(make_map(source, anchor).whole, [0.5, 0.3, 0.2], [0.1, 0.3, 0.2, 0.2, 0.1, 0.1])

    assert found == pytest.approx([0.5 / 6, 0.25, 0.5 / 3, 0.3, 0, 0.2])


def test_a_token_of_the_source_never_stands_for_one_that_begins_with_a_longer_of_its_own() -> None:
    tokens: list[bytes | None] = [b"a", b"ab", b"abc", b"b", b"\xff", b"\xff\xff"]
    probs = some_probabilities(6, 4)

    assert give(make_map(tokens, tokens).whole, probs, some_probabilities(6, 1)) == pytest.approx(
        probs
    )


@settings(deadline=None, max_examples=100)
@given(
    source=TOKENS | WORDS_AND_POINTS,
    anchor=TOKENS | WORDS_AND_POINTS,
    covered=st.text("ab.", min_size=1, max_size=2),
)
def test_tokens_that_the_anchor_contradicts_are_those_of_the_plain_rule(
    source: list[bytes | None], anchor: list[bytes | None], covered: str
) -> None:
    if not any(source) or not any(anchor):
        return
    vocabulary_map, text = make_map(source, anchor), covered.encode()
    spread = vocabulary_map.spread(text)
    source_probs = some_probabilities(len(source), 1)
    anchor_probs = some_probabilities(len(anchor), 2)
    for last in range(len(anchor)):
        kept = [0.0] * len(source)
        for token, is_out in zip(
            spread.sources, vocabulary_map.contradicted(text, last), strict=True
        ):
            kept[token] = 0.0 if is_out else source_probs[token]
        expected = project_plainly(
            source_probs, anchor_probs, source, anchor, covered=text, last=last
        )
        assert give(spread, kept, anchor_probs) == pytest.approx(expected, abs=1e-12)


def test_only_letters_that_follow_letters_are_contradicted() -> None:
    source: list[bytes | None] = [b"coded", b"code.x", b"code", b"  x", b" "]
    anchor: list[bytes | None] = [b"code", b"coded", b"code.", b" ", b"  "]
    vocabulary_map = make_map(source, anchor)

    assert vocabulary_map.spread(b"code").sources.tolist() == [1, 0]
    assert vocabulary_map.contradicted(b"code", 0).tolist() == [False, True]
    assert not vocabulary_map.contradicted(b" ", 3).any()


def test_bytes_of_which_all_are_255_are_found() -> None:
    tokens: list[bytes | None] = [b"\xff\xff\xff", b"\xff", b"\xff\xff"]

    assert sorted(make_map(tokens, tokens).spread(b"\xff").sources) == [0, 2]


def test_bytes_that_no_token_begins_with_heal_nothing() -> None:
    spread = make_map([b"a"], [b"a"]).spread(b"b")

    assert len(spread.sources) == 0


def test_the_first_token_is_the_longest_and_the_lowest_of_equal_ones() -> None:
    vocabulary_map = make_map([b"a", b"ab", b"ab", b"b"], [b"a"])

    assert vocabulary_map.first_token(b"abb") == 1
    with pytest.raises(InputError, match="expected bytes that the source can write, got b'c'"):
        vocabulary_map.first_token(b"c")


def test_the_digest_is_that_of_bytes_and_stop_tokens() -> None:
    tokens: list[bytes | None] = [b"a", b"bc", None]
    digest = make_map(tokens, tokens).digest()

    assert digest == make_map(list(tokens), list(tokens)).digest()
    assert digest != make_map([b"ab", b"c", None], tokens).digest()
    assert digest != make_map(tokens, tokens, (2,)).digest()
    assert digest != make_map(tokens, tokens, (), (2,)).digest()


def test_wrong_stop_tokens_and_empty_vocabularies_are_refused() -> None:
    with pytest.raises(InputError, match="stop tokens of the source: expected ids below 1, got 3"):
        make_map([b"a"], [b"a"], (3,))
    with pytest.raises(InputError, match="vocabulary of the anchor: expected tokens with bytes"):
        make_map([b"a"], [b"", None])


@pytest.mark.real
def test_the_map_of_two_real_vocabularies_places_every_token_by_its_bytes() -> None:
    folders = os.environ.get("CARRYON_SMOLLM2"), os.environ.get("CARRYON_QWEN")
    if not all(folder and (Path(folder) / "tokenizer.json").exists() for folder in folders):
        pytest.skip("set CARRYON_SMOLLM2 and CARRYON_QWEN to folders with their tokenizer.json")
    anchor, source = (token_bytes(AutoTokenizer.from_pretrained(folder)) for folder in folders)
    vocabulary_map = make_map(list(source), list(anchor))
    whole = vocabulary_map.whole
    members: dict[int, list[bytes]] = {}
    for member, group in zip(whole.members.tolist(), whole.groups.tolist(), strict=True):
        members.setdefault(group, []).append(anchor[member] or b"")

    assert len(members) == whole.num_groups
    first_bytes = {token[:1] for token in anchor if token}  # not all 256 in SmolLM2's
    for token, place in zip(source, whole.places.tolist(), strict=True):
        pieces = members.get(place, [])
        assert bool(pieces) == bool(token and token[:1] in first_bytes)
        if not pieces:
            continue
        is_split = all(piece.startswith(token or b"") for piece in pieces)
        assert is_split or (len(pieces) == 1 and token and token.startswith(pieces[0]))
    for text in (b" the", b"\n", b" return", "\u00e9".encode()):
        assert text in members[int(whole.places[source.index(text)])]
    crossing = vocabulary_map.spread(b" retu")
    assert b" return" in {source[n] for n in crossing.sources}
    assert {anchor[n] for n in crossing.members} >= {b"rn"}
