"""The customized model on tiny bases of every family: logits, caches, generation, refusals."""

import dataclasses
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_bases import FAMILIES, VOCAB_SIZE, make_tiny_base
from support.tiny_carryons import make_tiny_carryon, resign
from transformers import DynamicCache, TextIteratorStreamer, pipeline

from carryon.cache.base.hooks import base_logits, capture
from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import InputError, MissingError, SettingMismatchError
from carryon.cache.settings import ForwardSettings
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.modules.carryon import customized_states
from carryon.train.modules.serialization import read_card, read_weights, save_carryon

FLOAT32 = ForwardSettings(device="cpu", compute_dtype="float32")
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}
TAPS = ("final", "layer.1", "layer.0")


@pytest.fixture(scope="module", params=FAMILIES)
def family_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = make_tiny_base(tmp_path_factory.mktemp("families"), request.param)
    return load_base(str(folder), forward=FLOAT32)


@pytest.fixture(scope="module")
def model(family_base: Base) -> CarryOnForCausalLM:
    return CarryOnForCausalLM(family_base, *make_tiny_carryon(family_base, taps=TAPS))


@pytest.fixture
def tiny_model(tiny_base: Base) -> CarryOnForCausalLM:
    return CarryOnForCausalLM(tiny_base, *make_tiny_carryon(tiny_base, taps=TAPS))


@pytest.fixture
def carryon_folder(tiny_base: Base, tmp_path: Path) -> Path:
    carryon, card = make_tiny_carryon(tiny_base)
    save_carryon(tmp_path / "carryon", carryon, card, dtype=torch.bfloat16)
    return tmp_path / "carryon"


def _tokens(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def _bits(logits: torch.Tensor) -> torch.Tensor:
    return logits.view(torch.int32 if logits.dtype == torch.float32 else torch.int16)


def _left_padded() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return tokens [2, 12], their mask, and the two prompts of 12 and 7 tokens alone."""
    alone = [_tokens(1, 12), _tokens(1, 7, seed=6)]
    tokens, mask = torch.zeros(2, 12, dtype=torch.int64), torch.ones(2, 12, dtype=torch.int64)
    tokens[0], tokens[1, 5:], mask[1, :5] = alone[0], alone[1], 0
    return tokens, mask, alone


def test_untrained_carryon_is_the_base_bit_for_bit(family_base: Base) -> None:
    carryon, card = make_tiny_carryon(family_base, taps=TAPS, is_trained=False)
    model = CarryOnForCausalLM(family_base, carryon, card)
    tokens = _tokens(2, 9)
    assert torch.equal(_bits(model(tokens).logits), _bits(base_logits(family_base, tokens)))


def test_alpha_zero_is_the_base_bit_for_bit(model: CarryOnForCausalLM, family_base: Base) -> None:
    tokens, expected = _tokens(2, 9), _bits(base_logits(family_base, _tokens(2, 9)))
    assert torch.equal(_bits(model(tokens, alpha=0.0).logits), expected)
    assert not torch.equal(_bits(model(tokens).logits), expected)
    generated = model.generate(tokens[:1], alpha=0.0, **GREEDY)
    assert torch.equal(generated, family_base.model.generate(tokens[:1], **GREEDY))


@torch.no_grad()
def test_logits_are_those_of_the_corrected_states(
    model: CarryOnForCausalLM, family_base: Base
) -> None:
    tokens = _tokens(2, 9)
    states = capture(family_base, TAPS, tokens)
    carryon, _ = make_tiny_carryon(family_base, taps=TAPS)
    corrected = customized_states(states["final"], carryon(states), alpha=0.5)
    architecture = family_base.architecture
    expected = architecture.head(corrected) * architecture.logit_scale
    if architecture.softcap is not None:
        expected = architecture.softcap * torch.tanh(expected / architecture.softcap)
    torch.testing.assert_close(model(tokens, alpha=0.5).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cached_logits_equal_uncached_ones(model: CarryOnForCausalLM) -> None:
    tokens = _tokens(2, 14)  # beyond the sliding window of the Gemma bases
    expected = model(tokens, use_cache=False).logits
    output = model(tokens[:, :5], use_cache=True)
    logits = [output.logits]
    for chunk in (tokens[:, 5:6], tokens[:, 6:9], *tokens[:, 9:].split(1, dim=1)):
        output = model(chunk, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_generation_equals_full_recomputation(model: CarryOnForCausalLM) -> None:
    tokens = _tokens(1, 7)
    generated = model.generate(tokens, **GREEDY)
    for _ in range(GREEDY["max_new_tokens"]):
        best = model(tokens, use_cache=False).logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, best], dim=1)
    assert torch.equal(generated, tokens)


def test_left_padded_batch_generates_what_each_row_does_alone(model: CarryOnForCausalLM) -> None:
    tokens, mask, alone = _left_padded()
    together = model.generate(tokens, attention_mask=mask, **GREEDY)
    for row, prompt in enumerate(alone):
        single = model.generate(prompt, attention_mask=torch.ones_like(prompt), **GREEDY)
        assert torch.equal(together[row, 12:], single[0, prompt.shape[1] :])


def test_beams_reorder_the_carryons_cache_too(model: CarryOnForCausalLM) -> None:
    tokens, mask, _ = _left_padded()
    beams = {**GREEDY, "max_new_tokens": 4, "num_beams": 3, "attention_mask": mask}
    cached = model.generate(tokens, **beams)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **beams))


def test_bfloat16_base_and_carryon_generate_with_equal_bits_untrained(
    tiny_base_folder: Path,
) -> None:
    forward = ForwardSettings(device="cpu", compute_dtype="bfloat16")
    base = load_base(str(tiny_base_folder), forward=forward)
    tokens = _tokens(2, 9)
    model = CarryOnForCausalLM(base, *make_tiny_carryon(base, is_trained=False))
    (module,) = model.carryons.modules([1], device=base.device, dtype=base.compute_dtype)
    assert module.up.weight.dtype == torch.bfloat16
    assert torch.equal(_bits(model(tokens).logits), _bits(base_logits(base, tokens)))


def test_decoding_is_one_tokens_work_per_step(tiny_model: CarryOnForCausalLM) -> None:
    widths: list[int] = []
    (module,) = tiny_model.carryons.modules(
        [1], device=tiny_model.device, dtype=tiny_model.base.dtype
    )
    hook = module.body.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    with hook:
        tiny_model.generate(_tokens(1, 7), **{**GREEDY, "max_new_tokens": 4})
    assert widths == [7, 1, 1, 1]


def test_cache_is_cropped_and_continued_as_one(tiny_model: CarryOnForCausalLM) -> None:
    tokens = _tokens(1, 10)
    cache = DynamicCache()  # without a config: layers are added as they are used
    tiny_model(tokens, past_key_values=cache, use_cache=True)
    cache.crop(-4)
    logits = tiny_model(tokens[:, 6:], past_key_values=cache, use_cache=True).logits
    expected = tiny_model(tokens).logits[:, 6:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_cache_started_without_the_carryon_is_refused(tiny_model: CarryOnForCausalLM) -> None:
    tokens = _tokens(1, 6)
    cache = tiny_model(tokens, alpha=0.0, use_cache=True).past_key_values
    with pytest.raises(InputError, match="expected 6 tokens cached for the carry-on.*got 0"):
        tiny_model(tokens[:, :1], past_key_values=cache, use_cache=True)


def test_static_cache_is_refused(tiny_model: CarryOnForCausalLM) -> None:
    with pytest.raises(InputError, match="expected a cache that grows, got a static one"):
        tiny_model.generate(_tokens(1, 6), cache_implementation="static", **GREEDY)


def test_sampling_repeats_with_a_seed(tiny_model: CarryOnForCausalLM) -> None:
    sampled = []
    for _ in range(2):
        torch.manual_seed(3)
        sampling = {**GREEDY, "do_sample": True, "num_return_sequences": 2}
        sampled.append(tiny_model.generate(_tokens(1, 6), **sampling))
    assert torch.equal(*sampled)
    assert sampled[0].shape == (2, 12)


def test_a_streamer_receives_the_text_as_it_is_generated(tiny_model: CarryOnForCausalLM) -> None:
    streamer = TextIteratorStreamer(tiny_model.tokenizer, skip_prompt=True, timeout=10)
    arguments = {"inputs": _tokens(1, 6), "streamer": streamer, **GREEDY}
    thread = threading.Thread(target=tiny_model.generate, kwargs=arguments)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == tiny_model.tokenizer.decode(
        tiny_model.generate(_tokens(1, 6), **GREEDY)[0, 6:]
    )


def test_text_generation_pipeline_takes_the_model(tiny_model: CarryOnForCausalLM) -> None:
    generator = pipeline("text-generation", model=tiny_model, tokenizer=tiny_model.tokenizer)
    prompts = ["the an", "in the thing"]
    generator.tokenizer.padding_side = "left"
    outputs = generator(prompts, max_new_tokens=4, max_length=None, batch_size=2)
    assert all(
        out[0]["generated_text"].startswith(p) for out, p in zip(outputs, prompts, strict=True)
    )


def test_labels_give_the_loss_of_the_corrected_logits(tiny_model: CarryOnForCausalLM) -> None:
    tokens = _tokens(2, 9)
    output = tiny_model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(output.loss, expected)


def test_the_base_is_unchanged(tiny_model: CarryOnForCausalLM, tiny_base: Base) -> None:
    tokens = _tokens(1, 6)
    before = base_logits(tiny_base, tokens)
    tiny_model(tokens)
    with pytest.raises(IndexError):
        tiny_model(torch.tensor([[VOCAB_SIZE]]))
    assert torch.equal(base_logits(tiny_base, tokens), before)
    assert not any(module._forward_hooks for module in tiny_base.model.modules())


def test_threads_with_different_alphas_do_not_disturb_each_other(
    tiny_model: CarryOnForCausalLM,
) -> None:
    tokens, alphas = _tokens(2, 9), [0.0, 0.5, 1.0]
    expected = {alpha: tiny_model(tokens, alpha=alpha).logits for alpha in alphas}
    wrong: list[float] = []

    @torch.no_grad()
    def run(alpha: float) -> None:
        for _ in range(20):
            if not torch.equal(tiny_model(tokens, alpha=alpha).logits, expected[alpha]):
                wrong.append(alpha)

    threads = [threading.Thread(target=run, args=(alpha,)) for alpha in alphas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_from_pretrained_finds_the_base_by_its_card(carryon_folder: Path, tiny_base: Base) -> None:
    by_card = CarryOnForCausalLM.from_pretrained(carryon_folder, forward=FLOAT32)
    given = CarryOnForCausalLM.from_pretrained(carryon_folder, base=tiny_base)
    assert given.base is tiny_base.model
    tokens = _tokens(2, 9)
    assert torch.equal(by_card(tokens).logits, given(tokens).logits)


def test_saving_writes_the_carryon_alone(
    carryon_folder: Path, tiny_base: Base, tmp_path: Path
) -> None:
    model = CarryOnForCausalLM.from_pretrained(carryon_folder, base=tiny_base)
    model.save_pretrained(tmp_path / "again")
    names = {file.name for file in carryon_folder.iterdir()}
    assert {file.name for file in (tmp_path / "again").iterdir()} == names | {"config.json"}
    assert read_card(tmp_path / "again") == read_card(carryon_folder)
    before, after = read_weights(carryon_folder), read_weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_moved_base_is_reported_and_can_be_given(
    carryon_folder: Path, tiny_base_folder: Path
) -> None:
    resign(carryon_folder, base=read_card(carryon_folder).base | {"id": "/no/such/place"})
    with pytest.raises(MissingError, match="give its place with base.*/no/such/place"):
        CarryOnForCausalLM.from_pretrained(carryon_folder)
    base = str(tiny_base_folder)
    assert CarryOnForCausalLM.from_pretrained(carryon_folder, base=base, forward=FLOAT32)


def test_another_base_or_tokenizer_is_refused(
    carryon_folder: Path, tiny_base: Base, tmp_path: Path
) -> None:
    other = str(make_tiny_base(tmp_path / "other", seed=1))
    with pytest.raises(SettingMismatchError, match="expected the weights of .* got those of"):
        CarryOnForCausalLM.from_pretrained(carryon_folder, base=other, forward=FLOAT32)
    identity = dataclasses.replace(tiny_base.identity, tokenizer_sha256="1" * 64)
    with pytest.raises(SettingMismatchError, match=r"expected the tokenizer of .*111111"):
        CarryOnForCausalLM.from_pretrained(
            carryon_folder, base=dataclasses.replace(tiny_base, identity=identity)
        )


def test_copied_base_is_the_same_base(
    carryon_folder: Path, tiny_base_folder: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base_folder, copy)
    assert CarryOnForCausalLM.from_pretrained(carryon_folder, base=str(copy), forward=FLOAT32)


def test_alpha_out_of_range_is_refused(tiny_model: CarryOnForCausalLM) -> None:
    for alpha in (-0.1, 10.5, float("nan")):
        with pytest.raises(InputError, match="alpha: expected 0 to 10, got"):
            tiny_model(_tokens(1, 3), alpha=alpha)


def test_no_kernel_that_is_compiled_for_each_length_is_called(
    tiny_model: CarryOnForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = set()
    real = torch.nn.functional.scaled_dot_product_attention

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        allowed.add(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    for alpha in (0.0, 1.0):
        tiny_model.generate(torch.tensor([[5, 9, 20]]), alpha=alpha, max_new_tokens=2)

    assert allowed == {False}
