"""Answers of reasoning models, whose template opens or cuts what they think: learned as generated.

Behind a prompt that ends with <think> an engine returns the reasoning without its opening.
"""

from typing import Any

import pytest
from support.stock_templates import STOCK, StockTemplate
from support.template_scores import read_rows, targets_of, tokenizer_of

from carryon.cache.errors import InputError
from carryon.cache.format.framing import Framing
from carryon.train.inference.prompts import encode_prompts

RETURNED = "Two <b>and</b> two.\n</think>\n\nIt is 4."
NOTE = "turn with reasoning that the chat template cuts out, learned as generation has it"
OPENED = ("deepseek_r1", "qwq", "deepseek_v3_1_thinking")


def stock(name: str) -> StockTemplate:
    """Return a template by name."""
    [template] = [template for template in STOCK if template.name == name]
    return template


def record_of(*contents: str) -> dict[str, Any]:
    """Return a conversation of alternating turns."""
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }


@pytest.mark.parametrize("name", OPENED)
@pytest.mark.parametrize("opening", ["", "<think>"])
def test_what_an_engine_returned_continues_the_prompt_of_inference(name: str, opening: str) -> None:
    template = stock(name)
    tokenizer = tokenizer_of(template, "bytes")
    corpus = read_rows(template, [record_of("2 + 2?", opening + RETURNED)], tokenizer)
    [sample] = corpus.samples
    assert targets_of(tokenizer, [sample]) == [RETURNED + template.stop]
    assert [(note.reason, note.records) for note in corpus.report.notes] == [(NOTE, 1)]
    options = tuple(f"{key}={str(value).lower()}" for key, value in template.kwargs.items())
    framing = Framing(chat_template_kwargs=options)
    [asked] = encode_prompts(tokenizer, ["2 + 2?"], framing=framing, chat=True)
    assert sample.tokens[: len(asked)].tolist() == asked
    assert not sample.loss_mask[: len(asked)].any()


def test_reasoning_that_the_model_opens_itself_is_learned_whole() -> None:
    template = stock("nemotron")
    tokenizer = tokenizer_of(template, "bytes")
    text = f"<think>\n{RETURNED}"
    corpus = read_rows(template, [record_of("2 + 2?", text)], tokenizer)
    assert targets_of(tokenizer, corpus.samples) == [text + template.stop]


@pytest.mark.parametrize("name", OPENED)
def test_each_turn_of_a_conversation_is_learned_behind_its_own_prompt(name: str) -> None:
    template = stock(name)
    tokenizer = tokenizer_of(template, "bytes")
    record = record_of("2 + 2?", RETURNED, "1 + 1?", "One.\n</think>\n\nIt is 2.")
    corpus = read_rows(template, [record], tokenizer)
    ends = [f"{text}{template.stop}" for text in (RETURNED, "One.\n</think>\n\nIt is 2.")]
    assert targets_of(tokenizer, corpus.samples) == ends
    assert len(corpus.samples) == 2, "the template leaves earlier reasoning out of a prompt"


def test_a_prompt_that_has_ended_the_reasoning_takes_none() -> None:
    template = stock("deepseek_v3_1")
    with pytest.raises(InputError, match="does not write the content of this assistant"):
        read_rows(template, [record_of("2 + 2?", RETURNED)], tokenizer_of(template, "bytes"))


def test_a_template_that_writes_no_content_is_refused_still() -> None:
    template = stock("deepseek_r1")
    tokenizer = tokenizer_of(template, "bytes")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content.split('</think>')[-1]", "''"
    )
    with pytest.raises(InputError, match="does not write the content of this assistant"):
        read_rows(template, [record_of("2 + 2?", RETURNED)], tokenizer)


def test_marks_of_what_is_generated_do_not_shorten_a_continued_turn() -> None:
    template = stock("deepseek_r1")
    tokenizer = tokenizer_of(template, "bytes")
    cut = "{{- '<\uff5cAssistant\uff5c>' + message.content.split('</think>')[-1] + eos_token }}"
    marked = (
        "{{- '<\uff5cAssistant\uff5c>' }}{% generation %}"
        "{{- message.content.split('</think>')[-1] + eos_token }}{% endgeneration %}"
    )
    text = tokenizer.chat_template.replace("\\uff5c", "\uff5c")
    assert cut in text
    tokenizer.chat_template = text.replace(cut, marked)
    corpus = read_rows(template, [record_of("2 + 2?", RETURNED)], tokenizer)
    assert targets_of(tokenizer, corpus.samples) == [RETURNED + template.stop]


def test_a_tag_that_is_written_is_no_reasoning() -> None:
    template = stock("deepseek_r1")
    tokenizer = tokenizer_of(template, "bytes")
    corpus = read_rows(template, [record_of("Bold?", "Use <b>it</b>.")], tokenizer)
    assert targets_of(tokenizer, corpus.samples) == [f"Use <b>it</b>.{template.stop}"]
    assert NOTE not in [note.reason for note in corpus.report.notes]
