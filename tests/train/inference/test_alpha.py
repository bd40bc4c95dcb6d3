"""Which strengths a text names, and the plot of their losses."""

from pathlib import Path

import pytest

from carryon.cache.errors import InputError
from carryon.train.inference.alpha import parse_alphas, plot_alphas
from carryon.train.inference.evaluate import AlphaChoice


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


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    choice = AlphaChoice(
        num_samples=3,
        num_targets=9,
        base_nll=1.2,
        alphas=[0.0, 0.5, 1.0],
        nlls=[1.2, 0.9, 1.0],
        nll_ses=[0.1, 0.1, None],
    )
    assert plot_alphas(choice, tmp_path / "new" / "alpha.png")
    assert (tmp_path / "new" / "alpha.png").read_bytes().startswith(b"\x89PNG")
