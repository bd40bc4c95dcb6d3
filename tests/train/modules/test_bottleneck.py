"""Shape, causality, and an untrained carry-on that is the base."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from carryon.cache import device
from carryon.train.config import CarryOnSettings
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.carryon import CarryOn, customized_states, num_parameters
from carryon.train.modules.packed_attention import pack

WIDTH, ROWS, POSITIONS = 16, 3, 7


def _settings(**values: object) -> CarryOnSettings:
    shape = {"width": 8, "blocks": 2, "heads": 2, "intermediate_size": 12}
    return CarryOnSettings(**{**shape, **values})  # type: ignore[arg-type]


def _trained(settings: CarryOnSettings) -> CarryOn:
    """A carry-on whose every weight is random, so that nothing hides behind a zero."""
    carryon = build_bottleneck(settings, base_width=WIDTH, seed=0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in carryon.parameters():
            weight.add_(torch.randn(weight.shape, generator=random), alpha=0.3)
    return carryon.eval()


def _states(*taps: str) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(2)
    return {
        tap: torch.randn(ROWS, POSITIONS, WIDTH, generator=random).bfloat16()
        for tap in (taps or ("final",))
    }


@pytest.mark.parametrize("gate", ["channel", "token", "none"])
def test_an_untrained_carryon_is_the_base_bit_for_bit(gate: str) -> None:
    carryon = build_bottleneck(_settings(gate=gate), base_width=WIDTH, seed=0)
    states = _states()
    states["final"][0, 0, :4] = torch.tensor([0.0, -0.0, 1e-40, -3e38])
    head = torch.randn(50, WIDTH).bfloat16()

    with torch.no_grad():
        customized = customized_states(states["final"], carryon(states), alpha=1.0).bfloat16()

    assert torch.equal(customized.view(torch.int16), states["final"].view(torch.int16))
    assert torch.equal(customized @ head.t(), states["final"] @ head.t())


def test_alpha_zero_is_the_base_bit_for_bit_after_training() -> None:
    states = _states()
    states["final"][0, 0, 0] = -0.0

    with torch.no_grad():
        delta = _trained(_settings())(states)
        customized = customized_states(states["final"], delta, alpha=0.0).bfloat16()

    assert delta.abs().min() > 0
    assert torch.equal(customized.view(torch.int16), states["final"].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_states_are_corrected_part_by_part(
    dtype: torch.dtype, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_CPU_ROWS", 3)  # of 7
    random = torch.Generator().manual_seed(8)
    final = torch.randn(7, WIDTH, generator=random).bfloat16()
    delta = torch.randn(7, WIDTH, generator=random).to(dtype).requires_grad_()
    before, slopes = delta.detach().clone(), torch.randn(7, WIDTH, generator=random)

    corrected = customized_states(final, delta, alpha=alpha)
    (gradient,) = torch.autograd.grad((corrected * slopes).sum(), delta)

    assert torch.equal(corrected, final.float() + alpha * before.float())
    assert torch.equal(gradient, (alpha * slopes).to(dtype))
    assert torch.equal(delta, before)
    with torch.no_grad():
        assert torch.equal(customized_states(final, delta, alpha=alpha), corrected)


def test_an_untrained_carryon_can_be_trained() -> None:
    carryon = build_bottleneck(_settings(), base_width=WIDTH, seed=0)
    states = _states()

    customized = customized_states(states["final"], carryon(states), alpha=1.0)
    torch.autograd.backward(customized.square().sum())

    assert carryon.up.weight.grad is not None
    assert carryon.up.weight.grad.abs().min() > 0


def test_a_position_does_not_see_what_comes_after_it() -> None:
    carryon, states = _trained(_settings()), _states()
    changed = {"final": states["final"].clone()}
    changed["final"][:, 4:] = 9.0

    with torch.no_grad():
        before, after = carryon(states), carryon(changed)

    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_pads_on_the_right_do_not_change_a_sample() -> None:
    carryon, states = _trained(_settings()), _states()
    padded = {"final": torch.nn.functional.pad(states["final"], (0, 0, 0, 5))}

    with torch.no_grad():
        alone, beside_pads = carryon(states), carryon(padded)

    torch.testing.assert_close(alone, beside_pads[:, :POSITIONS])


def test_packed_samples_are_corrected_as_each_alone() -> None:
    carryon = _trained(_settings(taps=["final", "layer.1"]))
    states = _states("final", "layer.1")
    lengths = [POSITIONS, 2, 5]
    flat = {
        tap: torch.cat([rows[:length] for rows, length in zip(x, lengths, strict=True)])
        for tap, x in states.items()
    }
    wanted = torch.tensor([0, 5, POSITIONS, POSITIONS + 1, POSITIONS + 2, POSITIONS + 6])

    packed = carryon.correct_packed(flat, pack(torch.tensor(lengths)), wanted)
    packed_weights = _gradients(carryon, packed)
    alone = [
        carryon({tap: x[row : row + 1, :length] for tap, x in states.items()})[0]
        for row, length in enumerate(lengths)
    ]
    chosen = torch.cat(alone)[wanted]

    torch.testing.assert_close(packed, chosen)
    for name, gradient in _gradients(carryon, chosen).items():
        torch.testing.assert_close(packed_weights[name], gradient)


def _gradients(carryon: CarryOn, out: Tensor) -> dict[str, Tensor]:
    carryon.zero_grad()
    torch.autograd.backward(out.square().sum(), retain_graph=True)
    named = carryon.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


def test_a_cache_gives_the_same_corrections_token_by_token() -> None:
    settings = _settings()
    carryon, states = _trained(settings), _states()
    cache = DynamicCache()

    with torch.no_grad():
        at_once = carryon(states)
        pieces = [
            carryon({"final": states["final"][:, piece]}, past_key_values=cache)
            for piece in (slice(0, 4), slice(4, 5), slice(5, 7))
        ]

    torch.testing.assert_close(torch.cat(pieces, dim=1), at_once)


def test_pads_on_the_left_are_masked_out() -> None:
    carryon, states = _trained(_settings()), _states()
    pads = 3
    padded = {"final": torch.nn.functional.pad(states["final"], (0, 0, pads, 0), value=5.0)}
    mask = torch.ones(ROWS, pads + POSITIONS, dtype=torch.int64)
    mask[:, :pads] = 0
    position_ids = (mask.cumsum(dim=1) - 1).clamp(min=0)

    with torch.no_grad():
        alone = carryon(states)
        beside_pads = carryon(padded, attention_mask=mask, position_ids=position_ids)

    torch.testing.assert_close(alone, beside_pads[:, pads:])


def test_the_gate_weighs_several_taps_evenly_before_training() -> None:
    carryon = build_bottleneck(_settings(taps=["final", "layer.2"]), base_width=WIDTH, seed=0)

    shares = carryon.tap_ratios(_states("final", "layer.2"))

    assert torch.equal(shares, torch.full((ROWS, POSITIONS, 2), 0.5))


def test_each_tap_reaches_the_correction() -> None:
    taps = ["final", "layer.1", "layer.2"]
    carryon, states = _trained(_settings(taps=taps)), _states(*taps)

    with torch.no_grad():
        before = carryon(states)
        for tap in taps:
            changed = carryon({**states, tap: states[tap] * -1})
            assert not torch.allclose(before, changed), tap
        torch.testing.assert_close(
            carryon.tap_ratios(states).sum(dim=-1), torch.ones(ROWS, POSITIONS)
        )


def test_equal_seeds_give_equal_weights_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    one, same = (build_bottleneck(_settings(), base_width=WIDTH, seed=1) for _ in range(2))
    other = build_bottleneck(_settings(), base_width=WIDTH, seed=2)

    assert torch.equal(torch.rand(3), expected)
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, same.state_dict()[name])
    assert not torch.equal(one.bridges[0].weight, other.bridges[0].weight)  # type: ignore[arg-type]


def test_the_default_carryon_of_a_135m_base_is_one_megabyte() -> None:
    with torch.device("meta"):
        carryon = build_bottleneck(CarryOnSettings(), base_width=576, seed=0)

    assert num_parameters(carryon) * 2 <= 1.1e6
