"""Records aligned between bases: what each anchor token sees, and that nothing of it is later."""

from typing import Any

import numpy as np
import pytest
from support.aligned_tokenizers import BRACKETS, CHATML, TEXTS, make_tokenizer
from tokenizers import normalizers, pre_tokenizers

from carryon.cache.alignment.known_text import Known, broken_tokens, map_known
from carryon.cache.alignment.records import AlignedSample, Aligner, BaseTexts, path_to
from carryon.cache.alignment.spelling import Spelling
from carryon.cache.alignment.tree import visible
from carryon.cache.corpus.records import read_record
from carryon.cache.corpus.rows import Row
from carryon.cache.corpus.tokenize import Encoder
from carryon.cache.corpus.vocabulary.token_bytes import token_bytes
from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings

PAIRS = [
    ("gpt2", "qwen"),
    ("gpt2", "o200k"),
    ("qwen", "metaspace"),
    ("metaspace", "gpt2"),
    ("gemma", "qwen"),
]
CALL = {
    "id": "1",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 12, "b": ["x y"]}},
}
CHAT = [
    {"role": "user", "content": "  What is 12 + 30? " + TEXTS[3][:12]},
    {"role": "assistant", "content": "Let me see: they've", "tool_calls": [CALL]},
    {"role": "user", "content": "go on, \U0001f600\u4f60"},
    {"role": "assistant", "content": TEXTS[1]},
]


def make_aligner(
    anchor: str, other: str, *, template: str = BRACKETS, settings: CorpusSettings | None = None
) -> Aligner:
    """Return an aligner of two tokenizers."""
    made = [
        BaseTexts(
            make_tokenizer(kind, template=each, vocab_size=size),
            name=kind,
            settings=settings or CorpusSettings(),
            max_tokens=512,
            end_tokens=(),
            vocab_size=None,
        )
        for kind, each, size in ((anchor, CHATML, 300), (other, template, 500))
    ]
    return Aligner(*made)


def align(aligner: Aligner, fields: dict[str, Any]) -> list[AlignedSample]:
    """Return the samples of a record."""
    row = Row(
        fields=fields, where="line 1", made_id="r", is_held_out=False, expected="", num_bytes=1
    )
    return list(aligner.align(read_record(row)))


def seen_at(aligned: AlignedSample, row: int) -> tuple[Any, ...]:
    """Return everything that is known at an anchor token."""
    tree = aligned.tree
    exact, stable = int(tree.exact[row]), int(tree.stable[row])
    return (
        path_to(tree, exact),
        path_to(tree, stable),
        int(tree.covered[row]),
        int(tree.is_whole[row]),
    )


@pytest.mark.parametrize(("anchor", "other"), PAIRS)
def test_a_text_is_seen_up_to_the_end_of_each_token(anchor: str, other: str) -> None:
    aligner = make_aligner(anchor, other)
    text = TEXTS[0] + TEXTS[3].replace("\u0308", "")
    [made] = align(aligner, {"text": text})
    encoder = aligner._other.encoder
    for row, end in enumerate(made.sample.char_end.tolist()):
        end -= not made.tree.is_whole[row]
        path, stable, covered, is_whole = seen_at(made, row)
        assert path == encoder.encode(text[:end]).ids.tolist()
        assert path[: len(stable)] == stable
        if is_whole and row + 1 < len(made.sample.tokens):
            assert 0 <= covered <= len(text[:end].encode())
    assert not made.tree.is_whole.all() or anchor == "gemma" or anchor == "metaspace"


@pytest.mark.parametrize(("anchor", "other"), PAIRS[:2])
def test_covered_bytes_are_those_between_the_stable_token_and_the_last_known_byte(
    anchor: str, other: str
) -> None:
    aligner = make_aligner(anchor, other)
    own, others = (
        token_bytes(make_tokenizer(kind, vocab_size=size))
        for kind, size in ((anchor, 300), (other, 500))
    )
    text = TEXTS[0] + TEXTS[3].replace("\u0308", "") + "\U0001f600\u4f60x"
    [made] = align(aligner, {"text": text})
    known, num_begun = b"", 0
    for row, token in enumerate(made.sample.tokens.tolist()):
        known += own[token] or b""
        exact, stable, covered, is_whole = seen_at(made, row)
        spelled, ended = (b"".join(others[x] or b"" for x in each) for each in (exact, stable))
        whole = known.decode(errors="ignore").encode()
        assert spelled == whole
        assert is_whole == (whole == known)
        assert len(ended) + covered == len(known)
        num_begun += not is_whole
    assert known == text.encode()
    assert num_begun > 2


@pytest.mark.parametrize(("anchor", "other"), PAIRS)
def test_later_text_changes_nothing_that_was_seen(anchor: str, other: str) -> None:
    aligner = make_aligner(anchor, other)
    draw = np.random.default_rng(0)
    text = "".join(TEXTS[:4])
    for _ in range(25):
        at = int(draw.integers(1, len(text)))
        stop = at + int(draw.integers(0, 6))
        added = TEXTS[int(draw.integers(4))][: int(draw.integers(0, 9))]
        edited = text[:at] + added + text[stop:]
        first, second = (align(aligner, {"text": each})[0] for each in (text, edited))
        for row in range(min(len(first.sample.tokens), len(second.sample.tokens))):
            if first.sample.tokens[row] != second.sample.tokens[row]:
                break
            if max(first.sample.char_end[row], second.sample.char_end[row]) > at:
                break
            assert seen_at(first, row) == seen_at(second, row), (at, added, row)


@pytest.mark.parametrize(("anchor", "other"), PAIRS)
def test_a_conversation_is_seen_under_the_other_template(anchor: str, other: str) -> None:
    aligner = make_aligner(anchor, other)
    [made] = align(aligner, {"messages": CHAT})
    encoder = aligner._other.encoder
    [piece] = aligner._anchor.pieces(
        read_record(
            Row(
                fields={"messages": CHAT},
                where="",
                made_id="r",
                is_held_out=False,
                expected="",
                num_bytes=1,
            )
        )
    )
    prompt = piece.text.index("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")
    row = int(np.flatnonzero(made.sample.char_end == prompt)[-1])
    said = CHAT[0]["content"].strip()
    expected = f"[system] You help.\n[user] {said}<|im_end|>[assistant] "
    path, stable, covered, is_whole = seen_at(made, row)
    assert path == stable == encoder.encode(expected).ids.tolist()
    assert (covered, is_whole) == (0, 1)
    arguments = piece.text.index('"x y"') + 3
    row = int(np.searchsorted(made.sample.char_end, arguments))
    end = int(made.sample.char_end[row])
    known = expected + "Let me see: they've<add: " + piece.text[piece.text.index('{"a"') : end]
    assert seen_at(made, row)[0] == encoder.encode_all([(known, [len(expected)])])[0].ids.tolist()


def say(content: str, *, argument: str = "") -> dict[str, Any]:
    """Return an answer, with a call of a tool if it has an argument."""
    call = {**CALL, "function": {"name": "add", "arguments": {"a": argument}}}
    return {"role": "assistant", "content": content, **({"tool_calls": [call]} if argument else {})}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (say("Hello"), say(" Hello")),
        (say("\n\nHello"), say("\n\n\tHello")),
        (say("Hello \n"), say("Hello \nyou")),
        (say("Hello\n\n"), say("Hello\n\n  you \n")),
        (say("Hello"), say("", argument="x")),
        (say("\nHello"), say("\n", argument="x")),
        (say("\n\n ", argument="x"), say("\n\n  y", argument="x")),
        (say("ok ", argument="x"), say("ok then")),
        (say("ok", argument="x "), say("ok", argument="x y")),
    ],
)
@pytest.mark.parametrize("is_turned", [False, True])
def test_how_an_answer_goes_on_is_not_told_by_blanks_or_calls(
    first: dict[str, Any], second: dict[str, Any], is_turned: bool
) -> None:
    aligner = make_aligner("gpt2", "qwen")  # the template of the second trims white space
    if is_turned:
        aligner = Aligner(aligner._other, aligner._anchor)
    question, more = {"role": "user", "content": " Go. "}, [{"role": "user", "content": "and"}]
    chats = [[question, first], [question, second, *more, say(" x ")]]
    one, other = (align(aligner, {"messages": chat})[0] for chat in chats)
    num_compared = 0
    for row in range(min(len(one.sample.tokens), len(other.sample.tokens))):
        if one.sample.tokens[row] != other.sample.tokens[row]:
            break
        assert seen_at(one, row) == seen_at(other, row), row
        num_compared += 1
    assert num_compared > 10


def test_later_turns_change_nothing_that_was_seen() -> None:
    aligner = make_aligner("gpt2", "qwen")
    long, short = (align(aligner, {"messages": CHAT[:count]})[0] for count in (4, 2))
    for row in range(len(short.sample.tokens)):
        assert long.sample.tokens[row] == short.sample.tokens[row]
        assert seen_at(long, row) == seen_at(short, row)


def test_nodes_see_their_own_path_only() -> None:
    tree = align(make_aligner("gpt2", "qwen"), {"text": TEXTS[1]})[0].tree
    seen = visible(tree.parents)
    assert len(tree.tokens) > int((tree.parents == np.arange(-1, len(tree.tokens) - 1)).sum())
    for node in range(len(tree.tokens)):
        path = tree.tokens[np.flatnonzero(seen[node])].tolist()
        assert path == path_to(tree, node)


def test_text_that_a_normalizer_changes_is_refused_with_its_id() -> None:
    aligner = make_aligner("gpt2", "qwen")
    assert align(aligner, {"text": "caf\u00e9 is fine"})
    with pytest.raises(InputError, match="sample 'r': expected text in Unicode's form NFC"):
        align(aligner, {"text": "cafe\u0301 is not"})


def test_equal_tokens_of_two_texts_prove_nothing() -> None:
    first, second = "a\x04b \u4f60", "a\x06b \u4f60"
    encoder = make_aligner("lossy", "qwen")._anchor.encoder
    made = [encoder.encode(text) for text in (first, second)]
    assert made[0].ids.tolist() == made[1].ids.tolist()
    assert made[0].ends.tolist() == made[1].ends.tolist()
    for fields in ({"text": first}, {"prompt": "x", "completion": second}):
        with pytest.raises(InputError, match=r"sample 'r'.*U\+000[46].*may have the same tokens"):
            align(make_aligner("lossy", "qwen"), fields)
    assert align(make_aligner("gpt2", "qwen"), {"text": first})
    assert align(make_aligner("lossy", "qwen"), {"text": "\u4f60\U0001f600 fine"})


def test_a_character_with_a_token_is_spelled_though_its_bytes_have_none() -> None:
    spelling = Spelling(missing=b"\xe4", characters=frozenset("\u4f60"), twofold="")
    assert spelling.first_lost("\u4f60a") == ""
    assert spelling.first_lost("a\u4e16\u4f60") == "\u4e16"


def test_bytes_of_a_template_s_character_are_not_known_behind_a_content() -> None:
    known = Known(ends=np.array([1, 2, 4, 5]), partial=np.array([0, 1, 2, 0], dtype=np.int32))
    mapped = map_known(known, [(1, 4)], [(3, 6)])
    assert mapped.ends.tolist() == [0, 4, 6, 6]
    assert mapped.partial.tolist() == [0, 1, 0, 0]


def test_where_generation_begins_all_before_it_is_known_whatever_comes() -> None:
    known = Known(ends=np.array([3, 4, 4, 5]), partial=np.array([0, 0, 2, 0], dtype=np.int32))
    for answers, ends in (([], [5, 9, 9, 9]), ([(4, 6)], [5, 9, 11, 12]), ([(5, 6)], [5, 9, 9, 9])):
        own = [(1, 3), *answers]
        others = [(3, 5), *((11, 13) for _ in answers)]
        mapped = map_known(known, own, others, [(4, 9)])
        assert mapped.ends.tolist() == ends
        assert mapped.partial.tolist() == [0, 0, 2 if (4, 6) in answers else 0, 0]


@pytest.mark.parametrize("kind", ["metaspace", "gemma"])
def test_the_sign_of_a_blank_is_no_blank(kind: str) -> None:
    with pytest.raises(InputError, match=r"U\+2581"):
        align(make_aligner(kind, "qwen"), {"text": "a\u2581b"})
    assert align(make_aligner(kind, "qwen"), {"text": "a b \u4f60"})


def test_characters_begun_are_found_under_sequences_within_sequences() -> None:
    plain, nested = make_tokenizer("qwen"), make_tokenizer("qwen")
    backend = nested.backend_tokenizer
    inner = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Sequence([inner])])
    assert len(broken_tokens(Encoder(plain))) > 64
    assert broken_tokens(Encoder(nested)) == broken_tokens(Encoder(plain))


@pytest.mark.parametrize("is_always", [False, True])
def test_the_blank_before_any_text_tells_nothing_of_it(is_always: bool) -> None:
    tokenizer = make_tokenizer("metaspace", vocab_size=300)
    if is_always:  # as Llama 2's, which puts it before a blank too
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.backend_tokenizer.pre_tokenizer = None
    anchor = BaseTexts(
        tokenizer,
        name="metaspace",
        settings=CorpusSettings(),
        max_tokens=512,
        end_tokens=(),
        vocab_size=None,
    )
    aligner = Aligner(anchor, make_aligner("gpt2", "qwen")._other)
    for text in ("(x", "\u4f60", "'re", " (x", " \nx"):
        [made] = align(aligner, {"text": text})
        assert anchor.encoder.name_of([int(made.sample.tokens[0])]) == ["\u2581"]
        assert seen_at(made, 0) == ([], [], 0, 1)
    [made] = align(aligner, {"prompt": "(", "completion": "x"})
    assert seen_at(made, 0) == ([], [], 0, 1)


def test_a_conversation_of_blanks_is_refused_by_name() -> None:
    messages = [{"role": "user", "content": "  "}, {"role": "assistant", "content": " \n"}]
    aligner = make_aligner("gpt2", "qwen", settings=CorpusSettings(mask="all"))
    with pytest.raises(InputError, match="sample 'r': expected chat templates that write"):
        align(aligner, {"messages": messages})


def test_a_template_that_rewrites_turns_is_refused() -> None:
    template = BRACKETS.replace(
        "message['content'] |", "(message['content'] if loop.last else 'x' + message['content']) |"
    )
    with pytest.raises(InputError, match="rewrites earlier turns|sample"):
        align(make_aligner("gpt2", "qwen", template=template), {"messages": CHAT})


def test_prompts_and_completions_are_cut_where_generation_begins() -> None:
    aligner = make_aligner("gpt2", "qwen")
    [made] = align(aligner, {"prompt": "The quick", "completion": "er fox"})
    row = int(np.flatnonzero(made.sample.char_end == 9)[-1])
    path, stable, covered, _ = seen_at(made, row)
    assert path == stable == aligner._other.encoder.encode("The quick").ids.tolist()
    assert covered == 0
