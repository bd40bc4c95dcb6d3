"""Generation with a mixture: rows, sampling, streams, costs, and what is refused."""

import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.composed import FORWARD, generate, load
from support.corpus_files import write_lines
from support.mixed_stores import make_base
from transformers import TextStreamer

from carryon.cache.base.model import load_base
from carryon.cache.corpus import vocabulary
from carryon.cache.errors import InputError, MissingError, SettingMismatchError
from carryon.tools.cli.main import main
from carryon.train.inference import generate as generate_module
from carryon.train.inference.adapters import DEFAULT
from carryon.train.inference.mixing.modeling import MixedForCausalLM, load_mixed, log_costs
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.modules.serialization import read_card, read_weights

TEXTS = ["The quick brown f", "x", "    return width * hei"]


@pytest.fixture(scope="module")
def model(folder: Path) -> MixedForCausalLM:
    return load(folder)


def test_a_gate_that_gives_the_anchor_all_leaves_the_anchor_alone(folder: Path) -> None:
    model = load(folder)
    with torch.no_grad():
        model.composition.gate.out.weight.zero_()
        model.composition.gate.out.bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    alone = CarryOnForCausalLM.from_base(str(folder / "anchor-base"), forward=FORWARD)
    assert torch.equal(generate(model, TEXTS, alpha=0.0), generate(alone, TEXTS))


def test_rows_of_the_base_alone_are_not_mixed(folder: Path) -> None:
    model = load(folder)
    alone = CarryOnForCausalLM.from_base(str(folder / "anchor-base"), forward=FORWARD)
    plain = generate(alone, TEXTS)
    assert torch.equal(generate(model, TEXTS, carryons=[None] * 3), plain)
    assert not any(source.is_loaded for source in model.composition.sources)
    mixed = generate(model, TEXTS)
    assert all(source.is_loaded for source in model.composition.sources)
    some = generate(model, TEXTS, carryons=["default", None, "default"])
    assert torch.equal(some[[0, 2]], mixed[[0, 2]])
    assert torch.equal(some[1], plain[1])
    assert not torch.equal(mixed, plain)


def test_sampling_and_beams_are_the_same_with_a_cache(model: MixedForCausalLM) -> None:
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        sampled = generate(
            model, TEXTS, use_cache=use_cache, do_sample=True, num_return_sequences=2
        )
        beams = generate(model, TEXTS[::2], use_cache=use_cache, num_beams=3, max_new_tokens=6)
        found.append((sampled, beams))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0][0], found[0][0][1])


def test_answers_are_streamed_and_batched(
    model: MixedForCausalLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = model.answer(TEXTS[0], max_new_tokens=12, streamer=streamer)
    assert capsys.readouterr().out.rstrip("\n") == text.rstrip("\n")
    together = model.answer(TEXTS, max_new_tokens=12)
    assert together[0] == text
    monkeypatch.setattr(generate_module, "STAGE_TOKENS", 3)
    assert model.answer(TEXTS, max_new_tokens=12) == together


def test_a_conversation_is_read_through_the_template_of_each_base(folder: Path) -> None:
    model = load(folder)
    source = model.composition.sources[0]
    source.facts.tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    model.answer("The quick", max_new_tokens=4, chat=True)
    text = model.read_prompts(["The quick"], chat=True)["source_texts"][0][0]
    assert source.facts.tokenizer.decode(text.tokens) == "<The quick>"
    assert (text.num_stable, text.tail, text.is_next) == (len(text.tokens), "", True)


def test_costs_are_counted(model: MixedForCausalLM, caplog: pytest.LogCaptureFixture) -> None:
    log_costs(model)
    text = "The quick brown fox's den isn't far; we'll see it"
    with torch.no_grad():
        model(model.tokenizer(text, return_tensors="pt").input_ids)
    anchor, good, other = model.costs
    assert anchor.tokens > 10
    assert min(good.tokens, other.tokens) > 10
    assert good.tokens_again + other.tokens_again > 0
    assert good.seconds > 0
    with caplog.at_level(logging.INFO):
        log_costs(model)
    assert re.search(r"good-base: \d+\.\d s, [\d,]+ tokens, \d+ of them in the place", caplog.text)
    assert (good.tokens, good.tokens_again, good.seconds) == (0, 0, 0)


def test_it_is_saved_with_its_gate(folder: Path, model: MixedForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "run" / "carryon")
    (tmp_path / "bottleneck").symlink_to(tmp_path / "run")
    again = load(tmp_path, base=str(folder / "anchor-base"))
    assert torch.equal(generate(again, TEXTS), generate(model, TEXTS))
    assert read_card(tmp_path / "run" / "carryon", allow_mixture=True).mixture


def test_loaded_bases_and_other_places_are_taken(folder: Path, model: MixedForCausalLM) -> None:
    places = [folder / "good-base", load_base(str(folder / "random-base"), forward=FORWARD)]
    again = load(folder, mix=places, mix_device=["cpu"])
    assert [source.is_loaded for source in again.composition.sources] == [False, True]
    assert torch.equal(generate(again, TEXTS), generate(model, TEXTS))


def test_vocabularies_come_from_the_cache_of_training(
    folder: Path, model: MixedForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("a vocabulary is read again")

    monkeypatch.setattr(vocabulary.token_bytes, "token_bytes", read)
    digests = [
        [source.vocabulary_map.digest() for source in each.composition.sources]
        for each in (load(folder), model)
    ]
    assert digests[0] == digests[1]


def test_wrong_bases_are_refused(folder: Path, tmp_path: Path) -> None:
    good, other = str(folder / "good-base"), str(folder / "random-base")
    with pytest.raises(InputError, match="--mix: expected one for each of .*got 1. Fix: give 2"):
        load(folder, mix=[good])
    with pytest.raises(InputError, match="--mix-device: expected one for each"):
        load(folder, mix_device=["cpu"] * 3)
    with pytest.raises(SettingMismatchError, match="expected the tokenizer of .*in that order"):
        load(folder, mix=[other, good])
    with pytest.raises(MissingError, match="mix: the base .* was not found. Fix: .*--mix"):
        load(folder, mix=[good, str(tmp_path / "nowhere")])
    changed = make_base(tmp_path / "changed", "qwen", vocab_size=420, seed=8)
    late = load(folder, mix=[changed, other])  # weights are compared when they are loaded
    with pytest.raises(SettingMismatchError, match="expected the weights of .*got others"):
        generate(late, TEXTS)


def test_a_missing_source_is_refused_before_any_base_is_loaded(
    folder: Path, tmp_path: Path
) -> None:
    nowhere = str(tmp_path / "nowhere")
    with pytest.raises(MissingError, match="mix: the base .* was not found. Fix: .*--mix"):
        load(folder, base=nowhere, mix=[str(folder / "good-base"), nowhere])
    with pytest.raises(InputError, match="--mix: expected one for each of"):
        load(folder, base=nowhere, mix=[nowhere])


def test_sources_read_prompts_as_the_texts_of_the_mixture(folder: Path) -> None:
    model, texts = load(folder), ["The quick", "brown"]
    place = folder / "bottleneck" / "carryon"
    card = replace(read_card(place, allow_mixture=True), framing={"kinds": {"text": 2}})
    model.carryons.put(DEFAULT, read_weights(place), card)
    plain = model.read_prompts(texts, chat="auto")
    assert plain["source_texts"][0][0].tail  # a text that goes on
    messages = [[{"role": "user", "content": text}] for text in texts]
    assert model.read_prompts(messages, chat="auto") == plain


def test_what_sources_cannot_follow_is_refused(folder: Path, model: MixedForCausalLM) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(InputError, match="inputs_embeds or labels"):
        model(ids, labels=ids)
    with pytest.raises(InputError, match="input_ids: expected token ids"):
        model.generate(inputs_embeds=torch.zeros(1, 2, 8))
    cache = CarryOnForCausalLM.forward(model, ids, use_cache=True).past_key_values
    with pytest.raises(InputError, match="a cache that the mixture has begun, got 3 tokens"):
        model(ids, past_key_values=cache)
    with pytest.raises(InputError, match="a cache that only grows"):
        model(ids, use_cache=True).past_key_values.crop(-1)
    with pytest.raises(InputError, match="kind none, which corrects nothing"):
        generate(load(folder, "none"), TEXTS, alpha=0.5)
    long = "\U0001f600" * 150
    with pytest.raises(InputError, match="mix: .*-base: expected at most the 512 tokens"):
        generate(model, [long], max_new_tokens=2)


def test_commands_answer_with_a_mixture(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own: list[Any] = ["--carryon", str(folder / "none" / "carryon"), "--device", "cpu"]
    short = ["--max-new-tokens", "6"]
    generated = ["generate", "--prompt", "The quick brown f", *own, *short]
    assert main(generated) == 0
    shown = capsys.readouterr()
    assert "in the place of cropped ones" in shown.err
    assert main([*generated, "--compare"]) == 0
    assert "| mixture" in capsys.readouterr().out
    lost = ["--mix", str(folder / "good-base"), str(tmp_path / "nowhere")]
    assert main([*generated, *lost]) == 2
    assert "was not found. Fix: give its place with --mix" in capsys.readouterr().err
    questions = write_lines(
        tmp_path / "questions.jsonl",
        {"question": "The quick", "answer": "brown fox 1"},
        {"question": "def area(", "answer": "width 2"},
    )
    scored = ["score", "--tasks", str(questions), *own, *short, "--rule", "operator:is_not"]
    assert main([*scored, "--out", str(tmp_path / "answers.jsonl")]) == 0
    assert "good-base: " in capsys.readouterr().err
    early = ["--base", str(tmp_path / "nowhere"), "--arms", "base", "carryon@0.5"]
    assert main([*scored, *early]) == 2  # before the base is looked for
    assert "kind none, which corrects nothing" in capsys.readouterr().err


def test_a_mixture_by_state_is_refused(folder: Path, tmp_path: Path) -> None:
    place = folder / "bottleneck" / "carryon"
    card = read_card(place, allow_mixture=True)
    other = replace(card, mixture={**card.mixture, "by": "both"})
    base = load_base(str(folder / "anchor-base"), forward=FORWARD)
    with pytest.raises(InputError, match="a mixture by probability, got one by both"):
        load_mixed(place, other, base, mix=(), mix_device=(), forward=FORWARD, where=place)
