"""A picture where matplotlib is there, one line where it is not."""

from pathlib import Path

import pytest

from carryon.cache.errors import MissingExtraError
from carryon.train import plots
from carryon.train.plots import plot_curves

METRICS = [
    {"step": 0, "epoch": 0, "held_out_nll": 2.0},
    {"step": 10, "epoch": 0, "loss": 1.5, "learning_rate": 0.1},
    {"step": 20, "epoch": 1, "loss": 1.0, "learning_rate": 0.05},
    {"step": 20, "epoch": 1, "held_out_nll": 1.2},
]


@pytest.mark.slow
def test_the_curves_are_drawn(tmp_path: Path) -> None:
    assert plot_curves(METRICS, tmp_path / "curves.png")

    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise MissingExtraError('run pip install "gpt-carry-on[plot]"')

    monkeypatch.setattr(plots, "require", missing)

    assert not plot_curves(METRICS, tmp_path / "curves.png")

    assert "gpt-carry-on[plot]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
