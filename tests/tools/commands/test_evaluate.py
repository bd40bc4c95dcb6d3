"""`carryon evaluate` with several alphas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_carryons import make_tiny_carryon

from carryon.cache.base.model import Base
from carryon.cache.errors import InputError
from carryon.tools.cli.main import main
from carryon.tools.commands.evaluate import parse_alphas
from carryon.train.modules.serialization import read_card, save_carryon


@pytest.fixture
def carryon(tiny_base: Base, tmp_path: Path) -> str:
    made, card = make_tiny_carryon(tiny_base)
    save_carryon(tmp_path / "carryon", made, card, dtype=torch.float32)
    return str(tmp_path / "carryon")


def _json_lines(captured: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in captured.splitlines() if line.startswith("{")]


def test_a_range_includes_both_ends_and_has_round_numbers() -> None:
    assert parse_alphas("0:1.5:0.1") == [number / 10 for number in range(16)]
    assert parse_alphas("0.5:1:0.3") == [0.5, 0.8]
    assert parse_alphas("0.8") == [0.8]
    assert parse_alphas("") == []


@pytest.mark.parametrize(
    "text",
    ["x", "0:1", "0:1:0", "1:0:0.1", "0:1:-0.1", "0:1:1e-9", "nan", "0:inf:1", "::", "0:1:1:1"],
)
def test_text_that_is_neither_a_number_nor_a_range_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="alpha: expected a number, or FIRST:LAST:STEP"):
        parse_alphas(text)


def test_a_sweep_reports_the_best_alpha_draws_and_writes_it(
    store_original: Path, carryon: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["evaluate", "--store", str(store_original), "--carryon", carryon, "--device", "cpu"]
    plot = tmp_path / "alpha.png"
    assert main([*argv, "--alpha", "0:0.2:0.05", "--plot", str(plot), "--write-alpha"]) == 0
    output = capsys.readouterr()
    (report,) = _json_lines(output.out)
    choice = report["choice"]
    assert choice["alphas"] == [0.0, 0.05, 0.1, 0.15, 0.2]
    assert choice["nlls"][0] == choice["base_nll"]
    assert report["alpha"] == choice["alphas"][choice["nlls"].index(min(choice["nlls"]))]
    assert f"best alpha {report['alpha']:g}, chosen on {choice['num_targets']} tar" in output.err
    assert f"{report['carryon_nll']:.4f} +- {report['carryon_nll_se']:.4f} (alpha" in output.err
    assert "expected 2,000 or more" in output.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert read_card(carryon).alpha == report["alpha"]
    assert main(argv) == 0  # without --alpha: what was written
    (again,) = _json_lines(capsys.readouterr().out)
    assert (again["alpha"], again["choice"]) == (report["alpha"], None)
    assert again["num_targets"] == report["num_targets"] + choice["num_targets"]


def test_without_options_nothing_is_written(
    store_original: Path, carryon: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in Path(carryon).iterdir()}
    argv = ["evaluate", "--store", str(store_original), "--carryon", carryon, "--device", "cpu"]
    assert main([*argv, "--alpha", "0.3"]) == 0
    assert {path.name: path.read_bytes() for path in Path(carryon).iterdir()} == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--alpha", "0:1"], "alpha: expected a number, or FIRST:LAST:STEP"),
        (["--alpha", "11"], "alpha: expected 0 to 10, got 11"),
        (["--carryon", "anna/none", "--write-alpha"], "--write-alpha: expected a folder"),
        (["--plot", "alpha.png"], "--plot: expected several strengths"),
        (
            ["--alpha", "0:1:0.5", "--plot", "."],
            "--plot: expected a file for the page, got the fold",
        ),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str],
    text: str,
    store_original: Path,
    carryon: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["evaluate", "--store", str(store_original), "--carryon", carryon, "--device", "cpu"]
    assert main([*argv, *options]) == 2
    assert text in capsys.readouterr().err.splitlines()[-1]
