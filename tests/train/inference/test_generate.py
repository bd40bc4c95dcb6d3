"""Answers of a customized model to prompts."""

from pathlib import Path

import pytest
import torch
from support.tiny_carryons import make_tiny_carryon

from carryon.cache.base.model import Base
from carryon.cache.errors import InputError
from carryon.train.config import GenerateSettings
from carryon.train.inference.modeling import CarryOnForCausalLM
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
