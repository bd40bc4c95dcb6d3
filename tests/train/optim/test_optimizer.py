"""Low-precision weights and state follow AdamW, and resume bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_runs import train_tiny
from support.tiny_train_stores import make_tiny_store
from torch import Tensor

from carryon.cache.errors import InputError
from carryon.train.config import CarryOnSettings, MemorySettings, OptimizationSettings
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.carryon import CarryOn
from carryon.train.optim import lowbit_adamw
from carryon.train.optim.lowbit_adamw import FEWEST_CODED, LowBitAdamW, stochastic_round
from carryon.train.optim.optimizer import CompositeOptimizer, apply_memory_settings, build_optimizer

LEAN = MemorySettings(
    weights_dtype="bfloat16", optimizer_bits=8, step_in_backward=True, recompute=True
)
GROUP: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}
SIZE = FEWEST_CODED + 100  # 8-bit state, and not a multiple of the block


def _gradient(step: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(step))


def _moved(bits: int, *, steps: int = 20, restart_at: int = 0) -> Tensor:
    weight = torch.nn.Parameter(torch.ones(SIZE))
    optimizer = LowBitAdamW([{"params": [weight]}], **GROUP, bits=bits, seed=3)
    for step in range(steps):
        if step == restart_at:
            state = optimizer.state_dict()
            optimizer = LowBitAdamW([{"params": [weight]}], **GROUP, bits=bits, seed=3)
            optimizer.load_state_dict(state)
        weight.grad = _gradient(step)
        optimizer.step()
    return weight.detach()


def test_with_all_bits_it_is_adamw() -> None:
    weight = torch.nn.Parameter(torch.ones(SIZE))
    reference = torch.optim.AdamW([weight], **GROUP)
    for step in range(20):
        weight.grad = _gradient(step)
        reference.step()

    torch.testing.assert_close(_moved(32), weight.detach(), rtol=1e-5, atol=1e-6)


def test_with_eight_bits_moves_stay_near() -> None:
    exact, coded = _moved(32), _moved(8)

    assert float((coded - exact).norm() / (exact - 1).norm()) < 0.05


@pytest.mark.parametrize("bits", [32, 8])
def test_a_loaded_state_resumes_to_the_same_bits(bits: int) -> None:
    assert torch.equal(_moved(bits, restart_at=7), _moved(bits))


def test_the_noise_does_not_depend_on_pythons_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _moved(8, steps=3)
    monkeypatch.setattr(lowbit_adamw, "hash", lambda values: 1, raising=False)

    assert torch.equal(_moved(8, steps=3), expected)


def test_stochastic_rounding_is_right_on_average_and_keeps_what_fits() -> None:
    values = torch.full((20000,), 1 + 2**-10)  # an eighth of bfloat16's step above 1
    noise = torch.rand(len(values), generator=torch.Generator().manual_seed(0))

    rounded = stochastic_round(values, noise).float()

    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert abs(float((rounded - 1).mean()) / 2**-10 - 1) < 0.05
    assert torch.equal(stochastic_round(rounded, noise).float(), rounded)


def _carryon() -> CarryOn:
    settings = CarryOnSettings(width=8, blocks=1, heads=2, intermediate_size=8)
    return build_bottleneck(settings, base_width=16, seed=0)


def test_moving_in_the_backward_pass_gives_the_weights_of_one_optimizer() -> None:
    weights = []
    for in_backward in (False, True):
        carryon = _carryon()
        memory = MemorySettings(step_in_backward=in_backward)
        optimizer = build_optimizer(carryon, OptimizationSettings(), memory)
        mean = (carryon({"final": torch.ones(1, 3, 16)}) - 1).square().mean()
        if isinstance(optimizer, CompositeOptimizer):
            optimizer.backward_and_move(mean, max_norm=float("inf"))
            assert all(weight.grad is None for weight in carryon.parameters())
        else:
            torch.autograd.backward(mean)
            optimizer.step()
        weights.append(torch.cat([weight.detach().flatten() for weight in carryon.parameters()]))

    torch.testing.assert_close(weights[1], weights[0])


def test_muon_moves_only_the_matrices_of_the_blocks() -> None:
    carryon = _carryon()

    optimizer = build_optimizer(carryon, OptimizationSettings(optimizer="muon"), MemorySettings())

    assert isinstance(optimizer, CompositeOptimizer)
    taken = {id(weight) for weight in optimizer.parts[0].param_groups[0]["params"]}
    assert taken == {id(weight) for weight in carryon.body.parameters() if weight.ndim == 2}


def test_muon_in_few_bits_is_refused() -> None:
    with pytest.raises(InputError, match="optimizer: expected adamw with weights_dtype bfloat16"):
        build_optimizer(_carryon(), OptimizationSettings(optimizer="muon"), LEAN)


def test_low_precision_weights_are_bfloat16() -> None:
    carryon = apply_memory_settings(_carryon(), LEAN)

    assert {weight.dtype for weight in carryon.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"kl_weight": 0.1},
        {"gradient_filter": 1e-2, "head_dtype": "float32"},
        {**LEAN.to_dict(), "head_place": "mapped"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_each_way_to_train_lowers_the_held_out_nll(changes: dict[str, Any], tmp_path: Path) -> None:
    store = make_tiny_store(tmp_path / "store")

    report = train_tiny(store, tmp_path / "run", **changes)

    assert report.carryon_nll < report.base_nll
