"""Benchmarks of customized models, run once on tiny sizes; no speed is asserted."""

from pathlib import Path

import pytest
import torch
from support.benchmarks import measure

from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base
from carryon.tools.bench.random_carryons import make_carryons, make_prompts, pick_shape
from carryon.tools.bench.registry import list_groups
from carryon.tools.bench.same_logits import relative_error
from carryon.tools.bench.same_text import plain_logits
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.modules.bottleneck import Bottleneck
from carryon.train.modules.carryon import num_parameters

SIZES = {
    "compose.generate": {"batch_sizes": (1, 2)},
    "compose.equal_rows": {"rows": 3, "prompt_tokens": 8, "new_tokens": 2},
    "compose.load": {"carryons": 3},
    "compose.greedy": {"prompts": 3, "batch_sizes": (1, 2)},
}
QUICK = [
    pytest.param(name, marks=pytest.mark.slow) if name == "compose.load" else name
    for name in list_groups()["compose"]
    if name != "compose.families"
]


@pytest.mark.parametrize("name", QUICK)
def test_each_measurement_reports_finite_figures(
    name: str, tiny_base_folder: Path, tmp_path: Path
) -> None:
    has_carryon = name != "compose.equal_rows"
    sizes = SIZES.get(name, {}) | ({"carryon_bytes": 4096} if has_carryon else {})
    figures = measure(name, tmp_path, base=str(tiny_base_folder), sizes=sizes)
    assert figures
    assert all(figure.value >= 0 for figure in figures)
    by_name = {figure.figure: figure for figure in figures}
    if name == "compose.greedy":
        exact = {
            name: figure.value
            for name, figure in by_name.items()
            if name.startswith("greedy.float32")
        }
        assert exact == {"greedy.float32.batch-1": 1.0, "greedy.float32.batch-2": 1.0}
    if name == "compose.rows":
        [figure] = figures
        assert figure.details["row_without_carryon"] == 0.0
        assert figure.met
        assert figure.details["moved_by_the_carryons"] > 100 * figure.value
    if name == "compose.load":
        assert by_name["load.memory"].details["carryons"] == 3


@pytest.mark.slow
def test_every_family_is_compared(tiny_base_folder: Path, tmp_path: Path) -> None:
    [figure] = measure("compose.families", tmp_path, base=str(tiny_base_folder))
    assert len(figure.details["families"]) == 13
    assert figure.met


def test_a_shape_fills_a_megabyte_whatever_the_base() -> None:
    for width in (576, 2048, 4096):
        shape = pick_shape(width, max_bytes=1_100_000)
        num_bytes = 2 * num_parameters(Bottleneck(shape, base_width=width))
        assert 0.8e6 < num_bytes <= 1.1e6, width
    assert pick_shape(576, max_bytes=1_100_000).width == 128


def test_random_carryons_differ_and_correct_by_a_third(tiny_base: Base, tmp_path: Path) -> None:
    tokens = make_prompts(tiny_base, tmp_path, num=2, num_tokens=9)
    made = make_carryons(tiny_base, 2, max_bytes=4096, tokens=tokens)
    states = capture(tiny_base, ["final"], tokens)
    with torch.no_grad():
        deltas = [carryon(states) for carryon, _ in made]
    assert not torch.equal(*deltas)
    for delta in deltas:
        assert float(delta.norm() / states["final"].norm()) == pytest.approx(0.3, rel=1e-3)


def test_plain_recomputation_notices_another_alpha(tiny_base: Base, tmp_path: Path) -> None:
    tokens = make_prompts(tiny_base, tmp_path, num=2, num_tokens=9)
    carryon, card = make_carryons(tiny_base, 1, max_bytes=4096, tokens=tokens)[0]
    model = CarryOnForCausalLM(tiny_base, carryon, card)
    plain = plain_logits(tiny_base, carryon, tokens, 4)
    assert relative_error(model(tokens).logits[:, -5:-1], plain) < 1e-5
    assert relative_error(model(tokens, alpha=0.9).logits[:, -5:-1], plain) > 1e-4


def test_one_recomputation_decides_every_token_as_one_for_each_would(
    tiny_base: Base, tmp_path: Path
) -> None:
    tokens = make_prompts(tiny_base, tmp_path, num=2, num_tokens=9)
    carryon, _ = make_carryons(tiny_base, 1, max_bytes=4096, tokens=tokens)[0]
    at_once = plain_logits(tiny_base, carryon, tokens, 4)
    for place in range(4):
        shorter = plain_logits(tiny_base, carryon, tokens[:, : 6 + place], 1)
        assert relative_error(at_once[:, place], shorter[:, 0]) < 1e-5
