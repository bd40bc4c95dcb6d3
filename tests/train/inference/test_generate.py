"""Answers of a customized model to prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_bases import FAMILIES, make_tiny_base, make_tiny_tokenizer, randomize_
from support.tiny_carryons import make_tiny_carryon
from transformers import Lfm2Config, Lfm2ForCausalLM

from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings
from carryon.train.inference import generate
from carryon.train.inference.generate import generate_rows
from carryon.train.inference.generate_settings import GenerateSettings
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.inference.prefill import common_length
from carryon.train.modules.serialization import save_carryon

SHORT = GenerateSettings(max_new_tokens=6)


@pytest.fixture
def model(tiny_base: Base) -> CarryOnForCausalLM:
    return CarryOnForCausalLM(tiny_base, *make_tiny_carryon(tiny_base))


def _continue(model: CarryOnForCausalLM, text: str, *, alpha: float) -> str:
    ids = model.tokenizer(text, return_tensors="pt").input_ids
    greedy = {"do_sample": False, "max_new_tokens": 6, "alpha": alpha}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
    return str(model.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_prompt_goes_through_the_chat_template(model: CarryOnForCausalLM) -> None:
    text = "<|im_start|>user\nthe an<|im_end|>\n<|im_start|>assistant\n"
    assert model.answer("the an", settings=SHORT) == _continue(model, text, alpha=1.0)


def test_a_prompt_is_not_changed_without_chat(model: CarryOnForCausalLM) -> None:
    settings = GenerateSettings(max_new_tokens=6, chat=False)
    assert model.answer("the an", settings=settings) == _continue(model, "the an", alpha=1.0)


def _framed(model: CarryOnForCausalLM, base: Base, **framing: Any) -> CarryOnForCausalLM:  # noqa: ANN401
    """Return a model whose carry-on was trained on texts framed like this."""
    carryon, card = make_tiny_carryon(base)
    return CarryOnForCausalLM(base, carryon, replace(card, framing=framing))


@pytest.mark.parametrize("kind", ["text", "prompt and completion"])
def test_a_carryon_of_plain_texts_gets_the_plain_prompt(
    model: CarryOnForCausalLM, tiny_base: Base, kind: str
) -> None:
    plain = _framed(model, tiny_base, kinds={kind: 3, "messages": 1})
    assert plain.answer("the an", settings=SHORT) == _continue(model, "the an", alpha=1.0)


def test_a_carryon_of_conversations_gets_the_template_of_its_training(
    model: CarryOnForCausalLM, tiny_base: Base
) -> None:
    chat = _framed(
        model,
        tiny_base,
        kinds={"messages": 3},
        chat_template="{{ messages[0].content }} {{ a }}{{ strftime_now(' %Y') }}",
        chat_template_kwargs=["a=on"],
        template_date="2001-01-31",
    )
    text = _continue(model, "the an on 2001", alpha=1.0)
    assert chat.answer("the an", settings=SHORT) == text
    assert chat.answer(["the an"] * 2, settings=SHORT, carryons=[None, "default"])[1] == text


def test_variables_of_the_template_may_be_given(
    model: CarryOnForCausalLM, tiny_base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    template = {
        "chat_template": "{{ messages[0].content }} {{ a }}",
        "chat_template_kwargs": ["a=on"],
    }
    chat = _framed(model, tiny_base, kinds={"messages": 3}, **template)
    told = chat.answer("the an", settings=SHORT, chat_template_kwargs=["a=in"])
    assert told == _continue(model, "the an in", alpha=1.0)
    assert [record.getMessage() for record in caplog.records] == [
        "the carry-on was trained with other variables of the chat template (a=on), and now gets "
        "a=in. Fix: leave out --chat-template-kwargs"
    ]


def test_another_framing_than_in_training_is_a_warning(
    model: CarryOnForCausalLM, tiny_base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    plain = _framed(model, tiny_base, kinds={"text": 3})
    assert plain.answer("the an", settings=SHORT, chat=True) == model.answer(
        "the an", max_new_tokens=6
    )
    chat = _framed(model, tiny_base, kinds={"messages": 3}, chat_template_sha256="0" * 64)
    chat.answer("the an", settings=SHORT, chat="false")
    chat.answer(["the an"] * 3, settings=SHORT, batch_rows=1)
    assert [record.getMessage() for record in caplog.records] == [
        "the carry-on was trained on plain text, and now gets the chat template. Fix: leave out "
        "--chat",
        "the carry-on was trained on conversations, through a chat template, and now gets plain "
        "text. Fix: leave out --chat",
        "the base's chat template is another than the one that the carry-on was trained with. "
        "Fix: give the base as it was at extraction",
    ]


def test_a_chat_without_any_template_is_refused(
    model: CarryOnForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", None)
    assert model.answer("the an", settings=SHORT) == _continue(model, "the an", alpha=1.0)
    with pytest.raises(InputError, match=r"has no chat template.* Fix: --chat-template FILE"):
        model.answer("the an", settings=SHORT, chat=True)


def test_alpha_zero_answers_as_the_base(model: CarryOnForCausalLM) -> None:
    settings = GenerateSettings(max_new_tokens=6, chat=False)
    base_answer = model.answer("the an", settings=settings, alpha=0.0)
    assert base_answer == _continue(model, "the an", alpha=0.0)
    assert base_answer != model.answer("the an", settings=settings)


def test_sampled_answer_repeats_with_its_seed(model: CarryOnForCausalLM) -> None:
    answers = []
    for seed in (1, 1, 2):
        settings = GenerateSettings(max_new_tokens=12, temperature=1.5, top_p=0.95, seed=seed)
        state = torch.get_rng_state()
        answers.append(model.answer("the an", settings=settings))
        assert torch.equal(torch.get_rng_state(), state)
    assert answers[0] == answers[1] != answers[2]


def test_carryon_folder_alone_is_enough(
    tiny_base: Base, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    carryon, card = make_tiny_carryon(tiny_base)
    save_carryon(tmp_path / "carryon", carryon, card, dtype=torch.float32)
    loaded = CarryOnForCausalLM.from_pretrained(
        tmp_path / "carryon", device="cpu", compute_dtype="float32"
    )
    answer = loaded.answer("the an", max_new_tokens=6)
    assert capfd.readouterr().err == ""
    model = CarryOnForCausalLM(tiny_base, carryon, card)
    assert answer == model.answer("the an", settings=SHORT)


def test_bad_prompts_are_refused(model: CarryOnForCausalLM) -> None:
    with pytest.raises(InputError, match="prompt: expected some text, got none"):
        model.answer("", settings=SHORT)
    with pytest.raises(InputError, match=r"at most 122 tokens, so that 6 new ones .* 128, got"):
        model.answer("x" * 200, settings=SHORT)


def test_bad_settings_are_named_together() -> None:
    with pytest.raises(InputError, match=r"max_new_tokens: .*; temperature: .*; top_p: .*; seed"):
        GenerateSettings(max_new_tokens=0, temperature=-1.0, top_p=0.0, seed=-1)
    with pytest.raises(InputError, match="top_p: expected 1 for greedy answers, got 0.9. Fix"):
        GenerateSettings(top_p=0.9)


def test_answers_of_a_batch_are_those_of_each_prompt_alone(model: CarryOnForCausalLM) -> None:
    prompts = ["the an", "in the thing of the on", "on", "the"]
    expected = [model.answer(prompt, settings=SHORT) for prompt in prompts]
    for rows in (1, 3, 8):
        assert model.answer(prompts, settings=SHORT, batch_rows=rows) == expected


def test_answers_may_come_from_different_carryons(
    model: CarryOnForCausalLM, tiny_base: Base, tmp_path: Path
) -> None:
    carryon, card = make_tiny_carryon(tiny_base, seed=8)
    save_carryon(tmp_path / "other", carryon, card, dtype=torch.float32)
    model.add_carryon("other", tmp_path / "other")
    prompts = ["in the thing", "the an", "the an"]  # answered in the order of their lengths
    texts = model.answer(prompts, settings=SHORT, batch_rows=4, carryons=[None, "other", "default"])
    assert texts[0] == model.answer(prompts[0], settings=SHORT, alpha=0.0)
    assert texts[2] == model.answer(prompts[2], settings=SHORT)
    assert texts[1] != texts[2]


def test_what_the_base_recommends_does_not_change_greedy_text(model: CarryOnForCausalLM) -> None:
    settings = GenerateSettings(max_new_tokens=12, chat=False)
    expected = model.answer("the an", settings=settings)
    recommended = model.generation_config
    recommended.repetition_penalty, recommended.bos_token_id = 9.0, 10**30

    assert model.answer("the an", settings=settings) == expected
    assert model.generation_config is recommended


@pytest.fixture(scope="module", params=[*FAMILIES, "lfm2"])
def family_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> CarryOnForCausalLM:
    folder = tmp_path_factory.mktemp("families")
    if request.param == "lfm2":
        make_tiny_hybrid(folder)
    else:
        make_tiny_base(folder, request.param)
    base = load_base(str(folder), forward=ForwardSettings(device="cpu", compute_dtype="float32"))
    return CarryOnForCausalLM(base, *make_tiny_carryon(base))


def test_rows_that_end_leave_the_batch_and_change_no_answer(
    family_model: CarryOnForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model
    # Carry-ons refuse the cache of a convolution; the base alone answers.
    is_hybrid = model.base.config.model_type == "lfm2"
    names: list[str | None] = [None if is_hybrid else "default"] * 3
    rows = [model.tokenizer(f"{text} the")["input_ids"] for text in ("the", "in the an on", "on")]
    settings = GenerateSettings(max_new_tokens=20)
    first = torch.tensor([rows[0]])
    output = model.generate(first, do_sample=False, max_new_tokens=6, carryons=names[:1])
    # The sixth token of the first answer ends it, and others where they have it.
    monkeypatch.setattr(model.generation_config, "eos_token_id", int(output[0, -1]))
    monkeypatch.setattr(generate, "STAGE_TOKENS", 1000)
    whole = generate_rows(model, rows, settings=settings, carryons=names)
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(generate, "STAGE_TOKENS", 3)
    staged = generate_rows(model, rows, settings=settings, carryons=names)
    hook.remove()
    assert staged == whole
    assert whole[0].num_tokens <= 6
    assert not whole[0].is_cut
    assert sizes[0] == len(rows)
    if any(answer.is_cut for answer in whole) and not is_hybrid:
        assert sizes[-1] < len(rows)


@pytest.mark.parametrize("shared", ["the in the an on in the on an", ""])
def test_what_prompts_share_is_read_once_and_changes_no_answer(
    family_model: CarryOnForCausalLM, shared: str
) -> None:
    model = family_model
    is_hybrid = model.base.config.model_type == "lfm2"
    ends = (" the", " in the an on", " on", " in the an on", " the")
    rows = [model.tokenizer(shared + end)["input_ids"] for end in ends]
    names: list[str | None] = [None if is_hybrid else "default"] * len(rows)
    settings = GenerateSettings(max_new_tokens=12)
    alone = [generate_rows(model, [row], settings=settings, carryons=names[:1])[0] for row in rows]
    num_tokens: list[int] = []
    hook = model.base.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: num_tokens.append(args[0].numel())
    )
    together = generate_rows(model, rows, settings=settings, carryons=names)
    hook.remove()
    assert together == alone
    is_windowed = any(
        kind == "sliding_attention"
        for kind in getattr(model.base.config, "layer_types", None) or ()
    )
    if not is_hybrid and not is_windowed:
        new = sum(answer.num_tokens for answer in alone)
        common = len(model.tokenizer(shared)["input_ids"])
        assert sum(num_tokens) <= common + 3 * 8 + 5 * 24 + new, "each prompt was read whole"


@pytest.mark.parametrize("num_shared", [0, 9])
def test_equal_prompts_with_one_token_of_their_own_answer_as_alone(
    family_model: CarryOnForCausalLM, num_shared: int, caplog: pytest.LogCaptureFixture
) -> None:
    shared = list(range(5, 5 + num_shared))
    rows = [[*shared, *own] for own in ([20], [21, 22, 23, 24], [20])]
    names: list[str | None] = [None] * len(rows)
    settings = GenerateSettings(max_new_tokens=8)
    alone = [
        generate_rows(family_model, [row], settings=settings, carryons=names[:1])[0] for row in rows
    ]
    together = generate_rows(family_model, rows, settings=settings, carryons=names)
    assert together == alone
    assert "right-padding" not in caplog.text


def test_common_length_leaves_every_prompt_a_token() -> None:
    assert common_length([[1, 2, 3], [1, 2]]) == 1
    assert common_length([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_length([[1, 2, 3], [2, 2, 3]]) == 0


def make_tiny_hybrid(folder: Path) -> None:
    """Write a base with layers of convolution, whose cache cannot drop rows."""
    tokenizer = make_tiny_tokenizer()
    config: Any = Lfm2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    )  # fmt: skip
    model = Lfm2ForCausalLM(config)
    with torch.no_grad():
        randomize_(model, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def test_the_head_multiplies_no_slice_of_states(model: CarryOnForCausalLM) -> None:
    """Torch copies the whole head for every row of a slice."""
    shapes = list[tuple[bool, int]]()
    watch = model.base.get_output_embeddings().register_forward_hook(
        lambda _, args, __: shapes.append((args[0].is_contiguous(), args[0].shape[1]))
    )
    model.answer(["one two three", "four five six"], max_new_tokens=3)
    watch.remove()
    assert shapes == [(True, 1)] * len(shapes)
    assert shapes
