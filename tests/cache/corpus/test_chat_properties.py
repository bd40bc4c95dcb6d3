"""Random conversations under every stock template, and what holds for each of them.

Texts have blanks, newlines, other scripts, tags and, now and then, a special token's name. Each
has a word that stands nowhere else, so that its place in the samples is known.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.chat_engines import engine_turns
from support.chat_tokenizers import KINDS, Kind, spell
from support.stock_templates import STOCK, StockTemplate
from support.template_scores import (
    compare_with_engine,
    read_rows,
    spans_of,
    targets_of,
    tokenizer_of,
)

from carryon.cache.corpus.dataset import Corpus
from carryon.cache.errors import InputError

BITS = [
    *("\n", "\n\n", " ", "  ", "\t", "\r\n", "\u00a0", "<", "<b>", "<t", ">", "[", "]", ".", ":"),
    *("a", "He", "Se", "It", "\u00e9", "\u65e5", "\U0001f600", "\u0301", "assistant", "user"),
]
"""What random texts are made of, beside their own word."""
PROFILE = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def texts(draw: st.DrawFn, word: str, *, names: Sequence[str] = ()) -> str:
    """Draw a text around a word; `names` are other things that may stand in it."""
    bits = st.lists(st.sampled_from([*BITS, *names]), max_size=4).map("".join)
    return f"{draw(bits)}{word}{draw(bits)}"


@st.composite
def chats(draw: st.DrawFn, *, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Draw a conversation of one to four exchanges."""
    messages: list[dict[str, Any]] = []
    for turn in range(draw(st.integers(1, 4))):
        user, answer = (draw(texts(f"{word}{turn}", names=names)) for word in ("QUERY", "REPLY"))
        messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": answer})
        if draw(st.integers(0, 4)) == 0:
            messages[-1]["weight"] = 0
    if draw(st.booleans()) and len(messages) > 2:
        messages.pop()
    return messages


@pytest.mark.parametrize("kind", KINDS)
@PROFILE
@given(data=st.data())
def test_targets_are_the_replies_that_an_engine_produces(kind: Kind, data: st.DataObject) -> None:
    template = data.draw(st.sampled_from(STOCK), label="template")
    messages = data.draw(chats(), label="messages")
    tokenizer = tokenizer_of(template, kind)
    corpus = read_chat(template, messages, kind)
    if corpus is None:
        return
    turns = engine_turns(
        tokenizer,
        {"messages": messages},
        stops=template.end_tokens,
        variables=template.kwargs,
    )
    assert compare_with_engine(corpus.samples, turns) == ""


@pytest.mark.parametrize("kind", KINDS)
@PROFILE
@given(data=st.data())
def test_targets_have_the_replies_and_nothing_that_another_role_said(
    kind: Kind, data: st.DataObject
) -> None:
    template = data.draw(st.sampled_from(STOCK), label="template")
    names = [*template.special.split(), *template.end_tokens]
    messages = data.draw(chats(names=names), label="messages")
    corpus = read_chat(template, messages, kind)
    if corpus is None:
        return
    targets = targets_of(tokenizer_of(template, kind), corpus.samples)
    replies = [
        message["content"]
        for message in messages
        if message["role"] == "assistant" and message.get("weight") != 0
    ]
    assert len(targets) == len(replies)
    for target, reply in zip(targets, replies, strict=True):
        assert squeeze(reply) in squeeze(target)
        assert target.count("REPLY") == 1
        assert "QUERY" not in target


@pytest.mark.parametrize("kind", KINDS)
@PROFILE
@given(data=st.data())
def test_arrays_and_names_of_samples_are_consistent(kind: Kind, data: st.DataObject) -> None:
    template = data.draw(st.sampled_from(STOCK), label="template")
    messages = data.draw(chats(), label="messages")
    corpus = read_chat(template, messages, kind)
    if corpus is None:
        return
    tokenizer = tokenizer_of(template, kind)
    samples = list(corpus.samples)
    assert len({sample.id for sample in samples}) == len(samples)
    assert len({sample.group for sample in samples}) == 1
    for sample in samples:
        assert len(sample.tokens) == len(sample.loss_mask) == len(sample.char_end)
        assert (np.diff(sample.char_end) >= 0).all()
        assert set(np.unique(sample.loss_mask)) <= {0, 1}
        assert sample.loss_mask[0] == 0
        # the text that the tokens spell: SentencePiece's own blanks make it longer only
        text = spell(tokenizer, sample.tokens)
        assert 0 < sample.char_end[-1] <= len(text) + text.count("\ufffd") + num_swallowed(template)
        if len(samples) > 1:  # one a turn, which ends with its target
            assert len(spans_of(sample.loss_mask)) == 1
            assert sample.loss_mask[-1] == 1


def read_chat(template: StockTemplate, messages: list[dict[str, Any]], kind: Kind) -> Corpus | None:
    """Return the corpus of a conversation; None where nothing is to be learned from it.

    A template may drop what stands before `</think>`: such a conversation is refused, and so is
    one without a reply of weight 1.
    """
    is_learned = any(
        message["role"] == "assistant" and message.get("weight") != 0 for message in messages
    )
    try:
        return read_rows(template, [{"messages": messages}], tokenizer_of(template, kind))
    except InputError:
        if is_learned:
            raise
        return None


def squeeze(text: str) -> str:
    """Return a text without white space, which templates trim and tokenizers add."""
    return "".join(text.split())


def num_swallowed(template: StockTemplate) -> int:
    """Return how many blanks special tokens may swallow, as Phi-3's do."""
    return 10_000 if template.is_rstrip else 0


@pytest.mark.parametrize("kind", KINDS)
@PROFILE
@given(data=st.data())
def test_prompt_and_completion_are_given_back_and_no_token_reaches_over_their_border(
    kind: Kind, data: st.DataObject
) -> None:
    prompt = data.draw(texts("QUERY"), label="prompt")
    completion = data.draw(texts("REPLY"), label="completion")
    template = StockTemplate(name="smollm2", stop="</s>", bos="<s>", special="")
    tokenizer = tokenizer_of(template, kind)
    [sample] = read_rows(
        template, [{"prompt": prompt, "completion": completion}], tokenizer
    ).samples
    [(start, stop)] = spans_of(sample.loss_mask)
    assert stop == len(sample.tokens)
    shown = spell(tokenizer, sample.tokens[:start])
    assert shown in (prompt, f" {prompt}")  # SentencePiece's own blank
    assert spell(tokenizer, sample.tokens[start:]) == f"{completion}</s>"
    assert sample.char_end[start - 1] == len(prompt)
    assert sample.char_end[-1] == len(prompt) + len(completion)
    assert sample.tokens[:start].tolist() == tokenizer.encode(prompt, add_special_tokens=False)
