"""A module whose rows have weights of their own, against each module alone."""

from typing import Literal

import pytest
import torch
from support.tiny_bases import randomize_
from torch import nn

from carryon.cache.errors import InputError
from carryon.train.config import CarryOnSettings
from carryon.train.modules.bottleneck import build_bottleneck
from carryon.train.modules.carryon import CarryOn
from carryon.train.modules.stacked_weights import with_weights

CPU = torch.device("cpu")
WIDTH = 16


def _made(
    gate: Literal["channel", "token", "none"] = "channel", taps: tuple[str, ...] = ("final",)
) -> list[CarryOn]:
    settings = CarryOnSettings(width=8, heads=2, intermediate_size=8, gate=gate, taps=list(taps))
    made = [build_bottleneck(settings, base_width=WIDTH, seed=0) for _ in range(3)]
    for seed, carryon in enumerate(made):
        randomize_(carryon.eval().requires_grad_(False), seed=seed)
    return made


def _states(taps: tuple[str, ...] = ("final",)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {tap: torch.randn(3, 5, WIDTH, generator=generator) for tap in taps}


@pytest.mark.parametrize("gate", ["channel", "token", "none"])
@pytest.mark.parametrize("taps", [("final",), ("final", "layer.1")])
def test_each_row_is_computed_with_its_own_weights(
    gate: Literal["channel", "token", "none"], taps: tuple[str, ...]
) -> None:
    made, states = _made(gate, taps), _states(taps)
    rows = with_weights(
        made[0], [carryon.state_dict() for carryon in made], device=CPU, dtype=torch.float32
    )
    found = rows(states)
    for row, carryon in enumerate(made):
        torch.testing.assert_close(found[row], carryon(states)[row], rtol=1e-5, atol=1e-6)


def test_a_row_without_weights_gets_exactly_nothing() -> None:
    made = _made()
    weights = [made[0].state_dict(), None, made[2].state_dict()]
    found = with_weights(made[0], weights, device=CPU, dtype=torch.float32)(_states())
    assert not found[1].any()
    assert found[0].any()
    assert found[2].any()


def test_one_row_alone_serves_every_row_with_the_same_bits() -> None:
    made, states = _made(), _states()
    alone = with_weights(made[0], [made[1].state_dict()], device=CPU, dtype=torch.float32)
    assert torch.equal(alone(states), made[1](states))


def test_weights_take_the_type_and_buffers_keep_theirs() -> None:
    made = _made()
    for rows in ([made[1].state_dict()], [made[1].state_dict(), None]):
        module = with_weights(made[0], rows, device=CPU, dtype=torch.bfloat16)
        assert module.up.weight.dtype == torch.bfloat16


def test_the_shape_is_left_as_it_was() -> None:
    made = _made()
    before = {name: weight.clone() for name, weight in made[0].state_dict().items()}
    with_weights(made[0], [made[1].state_dict(), None], device=CPU, dtype=torch.bfloat16)
    with_weights(made[0], [made[1].state_dict()], device=CPU, dtype=torch.bfloat16)
    assert all(torch.equal(weight, before[name]) for name, weight in made[0].state_dict().items())


def test_a_part_that_rows_cannot_have_of_their_own_is_named() -> None:
    carryon = _made()[0]
    carryon.odd = nn.Conv1d(2, 2, 1)
    rows = [carryon.state_dict(), None]
    with pytest.raises(InputError, match="odd: expected matrices and norms, got Conv1d"):
        with_weights(carryon, rows, device=CPU, dtype=torch.float32)
