"""Targets of stock chat templates: what is learned is what the model has to produce.

Every case of every template has hand-written targets, and a reference that builds the conversation
as an inference engine does has the same tokens.
"""

import functools
import re

import pytest
from support.chat_engines import engine_turns
from support.chat_tokenizers import KINDS, Kind, spell
from support.stock_templates import CASES, STOCK, TEMPLATES, Refused, StockTemplate, record_of
from support.template_scores import (
    Score,
    compare_with_engine,
    engine_of,
    faults_of,
    read_rows,
    score_cell,
    summarize,
    targets_of,
    tokenizer_of,
)


@pytest.mark.parametrize("template", STOCK, ids=lambda template: template.name)
def test_every_case_has_its_targets_or_a_true_refusal(template: StockTemplate) -> None:
    scores = [score_of(template, case) for case in CASES]
    faults = {score.case: score.detail for score in scores if score.outcome != "right"}
    assert not faults


@pytest.mark.parametrize("template", STOCK, ids=lambda template: template.name)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_other_kinds_of_tokenizers_have_the_same_targets(
    kind: Kind, template: StockTemplate
) -> None:
    assert faults_of(template, tokenizer_of(template, kind)) == {}


@pytest.mark.parametrize("template", STOCK, ids=lambda template: template.name)
def test_the_hand_written_targets_are_what_an_engine_produces(template: StockTemplate) -> None:
    tokenizer = tokenizer_of(template, "bytes")
    for case in CASES:
        expected = template.expected(case)
        if isinstance(expected, Refused):
            continue
        turns = engine_of(template, case, tokenizer)
        assert [turn.reply for turn in turns] == expected, case
        assert [spell(tokenizer, turn.reply_tokens) for turn in turns] == expected, case


@pytest.mark.parametrize("template", STOCK, ids=lambda template: template.name)
def test_a_long_conversation_has_the_targets_of_an_engine(template: StockTemplate) -> None:
    tokenizer = tokenizer_of(template, "gpt2")
    messages = [
        {"role": role, "content": f"{role} {number}{end}"}
        for number, end in enumerate(["", "\n", ".", " ?", "\n\n"] * 5)
        for role in ("user", "assistant")
    ]
    corpus = read_rows(template, [{"messages": messages}], tokenizer)
    turns = engine_turns(
        tokenizer, {"messages": messages}, stops=template.end_tokens, variables=template.kwargs
    )
    assert len(turns) == 25
    assert compare_with_engine(corpus.samples, turns) == ""


def test_every_template_file_is_in_the_table() -> None:
    files = {path.stem for path in TEMPLATES.glob("*.jinja")}
    assert files == {template.file or template.name for template in STOCK}


def test_no_stock_template_refuses_a_plain_chat_or_is_learned_wrongly_in_silence() -> None:
    score = summarize([score_of(template, case) for template in STOCK for case in CASES])
    assert score["templates"] >= 28
    assert score["plain_refused"] == 0
    assert score["wrong"] == 0
    assert score["right_share"] >= 0.95


REWRITING = ("qwen3", "gpt_oss", "qwq", "mistral_nemo")


@pytest.mark.parametrize("template", STOCK, ids=lambda template: template.name)
def test_a_sample_of_one_turn_has_one_target_and_its_record_s_group(
    template: StockTemplate,
) -> None:
    case = "two" if isinstance(template.expected("think"), Refused) else "think"
    case = "system" if template.name == "mistral_nemo" else case
    tokenizer = tokenizer_of(template, "bytes")
    corpus = read_rows(template, [record_of(case), record_of("one")], tokenizer)
    samples = list(corpus.samples)
    if template.name in REWRITING:
        assert len(samples) == 3
    assert len({sample.id for sample in samples}) == len(samples)
    assert len({sample.group for sample in samples[:-1]}) == 1
    assert samples[-1].group != samples[0].group
    assert all(sample.role == 0 for sample in samples)


@pytest.mark.parametrize("name", ["falcon", "minicpm", "no_end"])
def test_targets_without_an_end_token_are_counted(name: str) -> None:
    template = stock(name)
    corpus = read_rows(template, [record_of("two")], tokenizer_of(template, "bytes"))
    assert "target without an end token" in [note.reason for note in corpus.report.notes]


@pytest.mark.parametrize("name", ["smollm2", "glm4", "gpt_oss", "eos_once", "llama3", "phi3"])
def test_targets_with_an_end_token_are_not(name: str) -> None:
    template = stock(name)
    corpus = read_rows(template, [record_of("two")], tokenizer_of(template, "bytes"))
    assert "target without an end token" not in [note.reason for note in corpus.report.notes]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *(("deepseek_v3", "tools"), ("llama4", "tools"), ("gpt_oss", "reasoning")),
        *(("llama3", "two"), ("phi3", "two"), ("gemma2", "two"), ("eos_once", "two")),
    ],
)
def test_without_a_generation_config_turns_end_with_the_tokenizer_s_end_token(
    name: str, case: str
) -> None:
    template = stock(name)
    tokenizer = tokenizer_of(template, "bytes")
    corpus = read_rows(template, [record_of(case)], tokenizer, has_ends=False)
    assert targets_of(tokenizer, corpus.samples) == template.expected(case)


def test_marks_are_found_where_the_prompt_writes_history_in_another_way() -> None:
    template = stock("gpt_oss")
    tokenizer = tokenizer_of(template, "bytes")
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template, count = re.subn(
        r"^(\{\{- '<\|start\|>assistant[ <].*\}\})$",
        r"{%- generation %}\n\1\n{%- endgeneration %}",
        tokenizer.chat_template,
        flags=re.MULTILINE,
    )
    assert count == 5
    for case in ("two", "reasoning", "tools", "thoughtful_tools"):
        corpus = read_rows(template, [record_of(case)], tokenizer)
        assert targets_of(tokenizer, corpus.samples) == template.expected(case), case


@pytest.mark.parametrize("name", ["deepseek_r1", "qwq"])
def test_a_prompt_that_the_finished_turn_does_not_begin_with_is_counted(name: str) -> None:
    template = stock(name)
    corpus = read_rows(template, [record_of("one")], tokenizer_of(template, "bytes"))
    reasons = [note.reason for note in corpus.report.notes]
    assert "turn whose prompt is not the beginning of the finished turn" in reasons


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("gemma2", "system"),
        ("drops_system", "system"),
        ("drops_tool_calls", "tools"),
        ("kimi_k2", "tools"),
        ("smollm2", "reasoning"),
        ("deepseek_v3_1", "think"),
    ],
)
def test_a_chat_that_a_template_drops_or_refuses_can_be_left_out_and_is_counted(
    name: str, case: str
) -> None:
    template = stock(name)
    records = [{**record_of(case), "id": "unfit"}, {**record_of("one"), "id": "fit"}]
    tokenizer = tokenizer_of(template, "bytes")
    corpus = read_rows(template, records, tokenizer, drop_unfit=True)
    assert [sample.id for sample in corpus.samples] == ["fit"]
    [loss] = corpus.report.losses
    assert (loss.reason, loss.records) == ("unfit for the chat template", 1)


@functools.cache
def _score(name: str, case: str) -> Score:
    return score_cell(stock(name), case, "bytes")


def score_of(template: StockTemplate, case: str) -> Score:
    """Return what becomes of a case with a tokenizer of bytes; computed once."""
    return _score(template.name, case)


def stock(name: str) -> StockTemplate:
    """Return a template by name."""
    [template] = [template for template in STOCK if template.name == name]
    return template
