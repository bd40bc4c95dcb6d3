"""Hidden states at the taps of tiny bases of every family, compared with transformers' own."""

from pathlib import Path

import pytest
import torch
from support.tiny_bases import FAMILIES, VOCAB_SIZE, make_tiny_base

from carryon.cache.base.hooks import base_logits, capture, watch_taps
from carryon.cache.base.model import Base, load_base, read_head
from carryon.cache.errors import InputError
from carryon.cache.settings import ForwardSettings


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = make_tiny_base(tmp_path_factory.mktemp("families"), request.param)
    return load_base(str(folder), forward=ForwardSettings(device="cpu", compute_dtype="float32"))


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(5))


def test_final_through_the_head_gives_the_bases_logits(base: Base) -> None:
    tokens = _tokens(2, 12)
    architecture = base.architecture
    scores = architecture.head(capture(base, ["final"], tokens)["final"]) * architecture.logit_scale
    if architecture.softcap is not None:
        scores = architecture.softcap * torch.tanh(scores / architecture.softcap)
    torch.testing.assert_close(scores, base_logits(base, tokens), rtol=1e-5, atol=1e-5)


def test_prenorm_through_the_stored_norm_gives_final(base: Base) -> None:
    states = capture(base, ["final", "prenorm"], _tokens(2, 12))
    normed = torch.from_numpy(read_head(base).norm.apply(states["prenorm"].numpy()))
    torch.testing.assert_close(normed, states["final"], rtol=1e-4, atol=1e-4)


def test_layers_are_the_models_own_hidden_states(base: Base) -> None:
    tokens = _tokens(2, 12)
    num_layers = base.identity.num_layers
    taps = [f"layer.{k}" for k in range(num_layers + 1)]
    states = capture(base, [*taps, "prenorm", "final"], tokens)
    with torch.inference_mode():
        shown = base.model(input_ids=tokens, output_hidden_states=True).hidden_states
    for k in range(num_layers):
        torch.testing.assert_close(states[f"layer.{k}"], shown[k])
    torch.testing.assert_close(states["final"], shown[num_layers])  # transformers' last is normed
    assert torch.equal(states[f"layer.{num_layers}"], states["prenorm"])


def test_padding_on_the_right_changes_nothing(base: Base) -> None:
    tokens = _tokens(2, 20)  # longer than the sliding window of the Gemma bases
    tokens[0, 11:] = 0
    taps = ["final", "layer.1", "layer.0"]
    padded, single = capture(base, taps, tokens), capture(base, taps, tokens[:1, :11])
    for tap in taps:
        torch.testing.assert_close(padded[tap][:1, :11], single[tap], rtol=1e-4, atol=1e-5)


def test_blocks_above_the_deepest_tap_are_not_run(tiny_base: Base) -> None:
    calls: list[str] = []
    hooks = [
        block.register_forward_hook(lambda *_, number=number: calls.append(f"block {number}"))
        for number, block in enumerate(tiny_base.architecture.blocks, start=1)
    ]
    hooks.append(tiny_base.architecture.head.register_forward_hook(lambda *_: calls.append("head")))
    try:
        both = capture(tiny_base, ["final", "layer.1"], _tokens(1, 6))
        assert calls == ["block 1", "block 2"]
        calls.clear()
        low = capture(tiny_base, ["layer.1"], _tokens(1, 6))
        assert calls == ["block 1"]
    finally:
        for hook in hooks:
            hook.remove()
    assert list(low) == ["layer.1"]
    assert torch.equal(low["layer.1"], both["layer.1"])


def test_the_embedding_needs_no_block(tiny_base: Base) -> None:
    calls: list[int] = []
    blocks = enumerate(tiny_base.architecture.blocks, start=1)
    hooks = [
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, block in blocks
    ]
    try:
        alone = capture(tiny_base, ["layer.0"], _tokens(1, 6))["layer.0"]
    finally:
        for hook in hooks:
            hook.remove()
    assert not calls
    embedding = tiny_base.model.get_input_embeddings()
    assert torch.equal(alone, embedding(_tokens(1, 6)))


def test_a_first_block_called_without_states_is_refused(tiny_base: Base) -> None:
    architecture = tiny_base.architecture
    with (
        watch_taps(architecture, ["layer.0"], lambda *_: None),
        pytest.raises(InputError, match=r"tap layer\.0: expected a first block .*leave out layer"),
    ):
        architecture.blocks[0](position_ids=torch.zeros(1, 6))


def test_hooks_are_removed_afterwards_and_after_an_error(tiny_base: Base) -> None:
    capture(tiny_base, ["final", "prenorm", "layer.1", "layer.0"], _tokens(1, 6))
    capture(tiny_base, ["layer.1"], _tokens(1, 6))
    with pytest.raises(IndexError):
        capture(tiny_base, ["final", "prenorm", "layer.2"], torch.tensor([[VOCAB_SIZE]]))
    for module in tiny_base.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_unknown_taps_are_refused(tiny_base: Base) -> None:
    for tap in ("layer.00", "layer.-1", "layer.3", "layer.01", "middle"):
        with pytest.raises(InputError, match=r"final, prenorm and layer\.0 to layer\.2"):
            capture(tiny_base, ["final", tap], _tokens(1, 6))


def test_states_have_the_compute_dtype(tiny_base_folder: Path) -> None:
    forward = ForwardSettings(device="cpu", compute_dtype="bfloat16")
    base = load_base(str(tiny_base_folder), forward=forward)
    states = capture(base, ["final"], _tokens(1, 6))["final"]
    assert states.dtype == torch.bfloat16
    assert states.shape == (1, 6, 16)
    assert not states.requires_grad
