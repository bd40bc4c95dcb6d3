"""`python -m carryon.tools.bench compose`, run once on next to nothing; no speed is asserted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from carryon.cache.base.hooks import capture
from carryon.cache.base.model import Base
from carryon.cache.errors import InputError
from carryon.tools.bench import compose as bench_compose_file
from carryon.tools.bench.__main__ import BENCH
from carryon.tools.bench.command import get_measurement
from carryon.tools.bench.compose_job import ComposeJob, make_carryons, make_prompts, pick_shape
from carryon.tools.bench.compose_settings import (
    FIGURES,
    QUICK_COMPOSE,
    BenchComposeSettings,
    BenchComposeSizes,
)
from carryon.tools.bench.same_logits import relative_error
from carryon.tools.bench.same_text import plain_logits
from carryon.tools.compare.figure import Figure
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.modules.bottleneck import Bottleneck
from carryon.train.modules.carryon import num_parameters

TINY = replace(QUICK_COMPOSE, carryon_bytes=4096, prompts=3, carryons=3, batch_sizes=[1, 2])


def _measure(figure: str, base: Base, work: Path) -> dict[str, Figure]:
    found: list[Figure] = []
    job = ComposeJob(base=base, sizes=TINY, work=work, report=found.append)
    get_measurement(FIGURES[figure])(job)
    return {item.figure: item for item in found}


QUICK_FIGURES = [
    pytest.param(name, marks=pytest.mark.slow) if name == "load" else name
    for name in FIGURES
    if name != "families"
]


@pytest.mark.parametrize("figure", QUICK_FIGURES)
def test_each_measurement_reports_finite_figures(
    figure: str, tiny_base: Base, tmp_path: Path
) -> None:
    found = _measure(figure, tiny_base, tmp_path)
    assert found
    assert all(item.value >= 0 for item in found.values())
    if figure == "greedy":
        assert {name: item.value for name, item in found.items()} == {
            "greedy.float32.batch-1": 1.0,
            "greedy.float32.batch-2": 1.0,
        }
    if figure == "rows":
        (item,) = found.values()
        assert item.details["row_without_carryon"] == 0.0
        assert item.met
        assert item.details["moved_by_the_carryons"] > 100 * item.value
    if figure == "load":
        assert found["load.memory"].details["carryons"] == 3


@pytest.mark.slow
def test_every_family_is_compared(tiny_base: Base, tmp_path: Path) -> None:
    (item,) = _measure("families", tiny_base, tmp_path).values()
    assert len(item.details["families"]) == 13
    assert item.met


def test_a_shape_fills_a_megabyte_whatever_the_base() -> None:
    for width in (576, 2048, 4096):
        shape = pick_shape(width, max_bytes=1_100_000)
        num_bytes = 2 * num_parameters(Bottleneck(shape, base_width=width))
        assert 0.8e6 < num_bytes <= 1.1e6, width
    assert pick_shape(576, max_bytes=1_100_000).width == 128


def test_made_up_carryons_differ_and_correct_by_a_third(tiny_base: Base, tmp_path: Path) -> None:
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


def test_the_command_prints_json_lines_and_writes_them(
    tiny_base_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_compose_file, "QUICK_COMPOSE", TINY)
    argv = ["compose", "--base", str(tiny_base_folder), "--quick", "--figures", "rows"]
    assert (
        BENCH.main([*argv, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]) == 0
    )
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")
    ]
    assert [line["figure"] for line in lines] == ["rows-4.logits"]
    assert (tmp_path / "out" / "figures.jsonl").read_text().count("\n") == 1
    assert list((tmp_path / "work").iterdir()) == []


def test_bad_settings_are_refused() -> None:
    with pytest.raises(InputError, match="figures: expected some of generate"):
        BenchComposeSettings(base="b", figures=["speed"])
    with pytest.raises(InputError, match="batch_sizes, rounds: expected more than 0"):
        BenchComposeSizes(rounds=0, batch_sizes=[])
