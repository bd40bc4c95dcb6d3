"""Several carry-ons on one base: each row of a batch has its own, or none."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
from support.tiny_bases import FAMILIES, VOCAB_SIZE, make_tiny_base
from support.tiny_carryons import make_tiny_carryon, resign

from carryon.cache.base.hooks import base_logits
from carryon.cache.base.model import Base, load_base
from carryon.cache.errors import InputError, MissingError, SettingMismatchError
from carryon.cache.settings import ForwardSettings
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.modules.serialization import WEIGHTS, save_carryon

FLOAT32 = ForwardSettings(device="cpu", compute_dtype="float32")
GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}
SHAPES = {
    "alice": {"seed": 1},
    "bob": {"seed": 2},
    "carol": {"seed": 3, "taps": ("final", "layer.1")},  # another shape, and another tap
    "dave": {"seed": 4, "blocks": 1, "gate": "token"},
}
ROWS = ["alice", None, "carol", "bob", "dave", "alice"]


@pytest.fixture(params=["llama", "gpt2", "gemma3", "mixtral"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Base:
    assert request.param in FAMILIES
    return load_base(str(make_tiny_base(tmp_path / "base", request.param)), forward=FLOAT32)


def _folders(base: Base, root: Path) -> dict[str, Path]:
    for name, shape in SHAPES.items():
        carryon, card = make_tiny_carryon(base, **shape)  # type: ignore[arg-type]
        save_carryon(root / name, carryon, card, dtype=torch.float32)
    return {name: root / name for name in SHAPES}


def _load(base: Base, folders: dict[str, Path]) -> CarryOnForCausalLM:
    model = CarryOnForCausalLM.from_base(base)
    for name, folder in folders.items():
        model.add_carryon(name, folder)
    return model


@pytest.fixture
def model(base: Base, tmp_path: Path) -> CarryOnForCausalLM:
    return _load(base, _folders(base, tmp_path))


@pytest.fixture
def tiny(tiny_base: Base, tmp_path: Path) -> CarryOnForCausalLM:
    """Carry-ons alice and bob on a tiny Llama."""
    folders = _folders(tiny_base, tmp_path)
    return _load(tiny_base, {name: folders[name] for name in ("alice", "bob")})


def _tokens(rows: int, length: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=generator)


@torch.no_grad()
def test_a_row_of_a_mixed_batch_is_that_carryon_alone(model: CarryOnForCausalLM) -> None:
    tokens = _tokens(len(ROWS))
    mixed = model(tokens, carryons=ROWS).logits
    for row, name in enumerate(ROWS):
        alone = model(tokens, carryons=[name] * len(ROWS)).logits[row]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(mixed, model(tokens, carryons=ROWS[::-1]).logits, atol=1e-2)


@torch.no_grad()
def test_a_row_without_a_carryon_is_the_base_bit_for_bit(
    model: CarryOnForCausalLM, base: Base
) -> None:
    tokens = _tokens(len(ROWS))
    expected = base_logits(base, tokens)
    assert torch.equal(model(tokens, carryons=ROWS).logits[1], expected[1])
    assert torch.equal(model(tokens).logits, expected)  # nothing is called default


def test_mixed_generation_from_a_cache_is_each_row_alone(model: CarryOnForCausalLM) -> None:
    tokens = _tokens(len(ROWS))
    mask = torch.ones_like(tokens)
    mask[0, :3] = mask[4, :5] = 0
    mixed = model.generate(tokens, attention_mask=mask, carryons=ROWS, **GREEDY)
    for row, name in enumerate(ROWS):
        prompt = tokens[row : row + 1, int((mask[row] == 0).sum()) :]
        seen = torch.ones_like(prompt)
        alone = model.generate(prompt, attention_mask=seen, carryons=[name], **GREEDY)
        assert torch.equal(mixed[row, 9:], alone[0, prompt.shape[1] :]), name


def test_mixed_generation_with_and_without_a_cache_agrees(model: CarryOnForCausalLM) -> None:
    settings = {**GREEDY, "carryons": ["alice", None, "carol"], "num_beams": 2}
    cached = model.generate(_tokens(3), **settings)
    assert torch.equal(cached, model.generate(_tokens(3), use_cache=False, **settings))


def test_a_finished_row_leaves_the_others_as_they_are(tiny: CarryOnForCausalLM) -> None:
    tokens, names = _tokens(3), ["alice", "bob", None]
    free = tiny.generate(tokens, carryons=names, **GREEDY)
    eos = int(free[0, 10])  # the first row ends there
    ended = tiny.generate(
        tokens, carryons=names, **{**GREEDY, "eos_token_id": eos, "pad_token_id": 0}
    )
    assert ended[0, 11:].tolist() == [0] * (ended.shape[1] - 11)
    for row in (1, 2):
        until = (free[row] == eos).nonzero().flatten().tolist()
        stop = min([index + 1 for index in until if index >= 9], default=ended.shape[1])
        assert torch.equal(ended[row, :stop], free[row, :stop])


@torch.no_grad()
def test_each_row_may_have_its_own_alpha(tiny: CarryOnForCausalLM, tiny_base: Base) -> None:
    tokens, names = _tokens(3), ["alice", "alice", "bob"]
    mixed = tiny(tokens, carryons=names, alpha=[0.5, 0.0, 2.0]).logits
    assert torch.equal(mixed[1], base_logits(tiny_base, tokens)[1])
    for row, alpha in ((0, 0.5), (2, 2.0)):
        alone = tiny(tokens, carryons=[names[row]] * 3, alpha=alpha).logits[row]
        torch.testing.assert_close(mixed[row], alone, rtol=1e-4, atol=1e-4)
    generated = tiny.generate(tokens, carryons=names, alpha=[0.5, 0.0, 2.0], **GREEDY)
    again = tiny.generate(tokens, carryons=names, alpha=[0.5, 0.0, 2.0], use_cache=False, **GREEDY)
    assert torch.equal(generated, again)


def test_each_carryon_uses_its_saved_alpha_by_default(tiny_base: Base, tmp_path: Path) -> None:
    model = CarryOnForCausalLM.from_base(tiny_base)
    for name, alpha in (("weak", 0.25), ("strong", 2.0)):
        carryon, card = make_tiny_carryon(tiny_base, alpha=alpha)
        save_carryon(tmp_path / name, carryon, card, dtype=torch.float32)
        model.add_carryon(name, tmp_path / name)
    tokens, names = _tokens(2), ["weak", "strong"]
    assert torch.equal(
        model(tokens, carryons=names).logits,
        model(tokens, carryons=names, alpha=[0.25, 2.0]).logits,
    )


def test_embeddings_may_be_given_instead_of_tokens(tiny: CarryOnForCausalLM) -> None:
    tokens, names = _tokens(2), ["alice", "bob"]
    embedded = tiny.base.get_input_embeddings()(tokens)
    mask = torch.ones_like(tokens)
    output = tiny.generate(inputs_embeds=embedded, attention_mask=mask, carryons=names, **GREEDY)
    expected = tiny.generate(tokens, attention_mask=mask, carryons=names, **GREEDY)
    assert torch.equal(output, expected[:, tokens.shape[1] :])


def test_several_sequences_of_a_prompt_have_its_carryon(tiny: CarryOnForCausalLM) -> None:
    settings = {**GREEDY, "num_beams": 2, "num_return_sequences": 2}
    output = tiny.generate(_tokens(2), carryons=["alice", "bob"], alpha=[1.0, 0.5], **settings)
    for row, (name, alpha) in enumerate((("alice", 1.0), ("bob", 0.5))):
        alone = tiny.generate(_tokens(2)[row : row + 1], carryons=[name], alpha=alpha, **settings)
        assert torch.equal(output[2 * row : 2 * row + 2], alone)


def test_the_base_runs_once_for_a_mixed_batch(model: CarryOnForCausalLM) -> None:
    calls: list[int] = []
    with model.base.get_input_embeddings().register_forward_hook(
        lambda module, args, output: calls.append(len(args[0]))
    ):
        model.generate(_tokens(len(ROWS)), carryons=ROWS, **{**GREEDY, "max_new_tokens": 3})
    assert calls == [len(ROWS)] * 3


def test_carryons_are_added_dropped_and_replaced_while_in_use(
    tiny: CarryOnForCausalLM, tiny_base: Base, tmp_path: Path
) -> None:
    tokens = _tokens(2)
    before = tiny.generate(tokens, carryons=["alice", "bob"], **GREEDY)
    tiny.drop_carryon("alice")
    with pytest.raises(InputError, match="no carry-on is called 'alice'; loaded are bob"):
        tiny.generate(tokens, carryons=["alice", "bob"], **GREEDY)
    carryon, card = make_tiny_carryon(tiny_base, seed=9)
    save_carryon(tmp_path / "new", carryon, card, dtype=torch.float32)
    tiny.add_carryon("alice", tmp_path / "new")
    after = tiny.generate(tokens, carryons=["alice", "bob"], **GREEDY)
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])
    with pytest.raises(InputError, match="no carry-on is called 'eve'"):
        tiny.drop_carryon("eve")


def test_a_running_batch_keeps_a_dropped_carryon(tiny: CarryOnForCausalLM) -> None:
    tokens, names = _tokens(2), ["alice", "bob"]
    expected = tiny.generate(tokens, carryons=names, **GREEDY)
    steps: list[int] = []

    def drop(*_: object) -> None:
        steps.append(1)
        if len(steps) == 3:
            tiny.drop_carryon("alice")

    with tiny.base.register_forward_hook(drop):
        output = tiny.generate(tokens, carryons=names, **GREEDY)
    assert torch.equal(output, expected)
    assert tiny.carryons.names == ["bob"]


def test_threads_with_other_carryons_do_not_disturb_each_other(tiny: CarryOnForCausalLM) -> None:
    tokens = _tokens(2)
    batches = [["alice", "bob"], ["bob", "alice"], [None, "bob"], ["alice", "alice"]]
    expected = [tiny.generate(tokens, carryons=names, **GREEDY) for names in batches]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(3):
            output = tiny.generate(tokens, carryons=batches[number], **GREEDY)
            if not torch.equal(output, expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_cache_started_with_other_carryons_is_refused(tiny: CarryOnForCausalLM) -> None:
    tokens = _tokens(2)
    cache = tiny(tokens, carryons=["alice", "bob"], use_cache=True).past_key_values
    with pytest.raises(InputError, match="expected the carry-ons that the cache was started with"):
        tiny(tokens[:, :1], carryons=["bob", "alice"], past_key_values=cache)


def test_fewer_or_more_names_than_rows_are_refused(tiny: CarryOnForCausalLM) -> None:
    tokens = _tokens(3)
    for names in (["alice"], ["alice"] * 4, "alice"):
        with pytest.raises(InputError, match="one name or None for each of the 3 rows, got"):
            tiny.generate(tokens, carryons=names, **GREEDY)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="alpha: expected a number, or one for each of the 3"):
        tiny.generate(tokens, carryons=["alice"] * 3, alpha=[1.0, 1.0], **GREEDY)
    with pytest.raises(InputError, match="alpha: expected 0 to 10, got 11"):
        tiny.generate(tokens, carryons=["alice"] * 3, alpha=[1.0, 1.0, 11.0], **GREEDY)


def test_a_prompt_longer_than_the_context_is_refused(tiny: CarryOnForCausalLM) -> None:
    with pytest.raises(InputError, match="prompt: expected at most the 128 tokens .* got 129"):
        tiny.generate(_tokens(1, 129), carryons=["bob"], **GREEDY)


def test_a_carryon_of_another_base_or_shape_is_refused(
    tiny: CarryOnForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(MissingError, match="expected a carry-on .* found none"):
        tiny.add_carryon("eve", tmp_path)
    other = load_base(str(make_tiny_base(tmp_path / "other", seed=1)), forward=FLOAT32)
    carryon, card = make_tiny_carryon(other)
    save_carryon(tmp_path / "eve", carryon, card, dtype=torch.float32)
    with pytest.raises(SettingMismatchError, match="expected the weights of"):
        tiny.add_carryon("eve", tmp_path / "eve")
    shutil.copy(tmp_path / "dave" / WEIGHTS, tmp_path / "alice" / WEIGHTS)
    resign(tmp_path / "alice")
    with pytest.raises(InputError, match="not a carry-on .*: expected .*, got"):
        tiny.add_carryon("eve", tmp_path / "alice")
    assert tiny.carryons.names == ["alice", "bob"]


def test_a_loaded_carryon_takes_its_saved_bytes_and_no_module(
    tiny: CarryOnForCausalLM, tmp_path: Path
) -> None:
    for number in range(20):
        tiny.add_carryon(f"user-{number}", tmp_path / "alice")
    loaded = [tiny.carryons.get(name) for name in tiny.carryons.names]
    assert len({id(each.shape) for each in loaded}) == 1
    for each in loaded:
        num_bytes = sum(weight.nbytes for weight in each.weights.values())
        assert num_bytes <= (tmp_path / "alice" / WEIGHTS).stat().st_size


@torch.no_grad()
def test_mixed_rows_agree_in_bfloat16_too(tiny_base_folder: Path, tmp_path: Path) -> None:
    forward = ForwardSettings(device="cpu", compute_dtype="bfloat16")
    base = load_base(str(tiny_base_folder), forward=forward)
    model = _load(base, _folders(base, tmp_path))
    tokens = _tokens(len(ROWS))
    mixed = model(tokens, carryons=ROWS).logits.float()
    for row, name in enumerate(ROWS):
        alone = model(tokens, carryons=[name] * len(ROWS)).logits[row].float()
        error = (mixed[row] - alone).norm() / alone.norm()
        assert error < 2 * torch.finfo(torch.bfloat16).eps, name
