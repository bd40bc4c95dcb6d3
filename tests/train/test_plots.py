"""Plots are written where matplotlib is installed; else a log line says how to install it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from carryon.cache.errors import MissingExtraError
from carryon.train import plots
from carryon.train.plots import (
    Axes,
    Line,
    Point,
    draw,
    lines,
    plot_curves,
    plot_paths,
    plot_runs,
    points,
)

METRICS = [
    {"step": 0, "epoch": 0, "held_out_nll": 2.0},
    {"step": 10, "epoch": 0, "loss": 1.5, "learning_rate": 0.1, "tokens": 50},
    {"step": 20, "epoch": 1, "loss": 1.0, "learning_rate": 0.05, "tokens": 100},
    {"step": 20, "epoch": 1, "held_out_nll": 1.2},
]


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_curves_runs_and_rates_are_drawn(tmp_path: Path) -> None:
    assert plot_curves(METRICS, tmp_path / "curves.png")
    assert plot_runs({"a": METRICS, "b": METRICS}, tmp_path / "runs.png")
    assert plot_paths({"trunk": [0.1] * 20}, tmp_path / "paths.png")
    assert all(map(is_png, tmp_path.iterdir()))
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_panels_show_lines_and_points(tmp_path: Path) -> None:
    seen: list[Axes] = []

    def curves(axes: Axes) -> None:
        seen.append(axes)
        series = [Line(xs=[1, 2], ys=[3.0, 4.0], label="a"), Line(xs=[1], ys=[2.0], is_dashed=True)]
        levels = {"base": 3.5, "base, instructed": 3.7}
        lines(axes, series, x_label="step", y_label="loss", levels=levels)

    def sizes(axes: Axes) -> None:
        seen.append(axes)
        marks = [Point(x=1, y=2, label="p"), Point(x=10, y=1, label="q", marker="^")]
        points(axes, marks, x_label="MB", y_label="loss", is_log_x=True)

    path = tmp_path / "new" / "plot.png"
    assert draw(path, curves, sizes, width=3)
    assert is_png(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["plot.png"]
    left, right = seen
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        *("a", "base", "base, instructed")
    ]
    assert len({each.get_linestyle() for each in left.get_lines()[-2:]}) == 2, "levels look alike"
    assert [text.get_text() for text in right.texts] == ["p", "q"]


def test_without_matplotlib_a_log_line_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise MissingExtraError('run pip install "gpt-carry-on[plot]"')

    monkeypatch.setattr(plots, "require", missing)

    assert not plot_curves(METRICS, tmp_path / "curves.png")

    [record] = caplog.records
    assert "gpt-carry-on[plot]" in record.message
    assert list(tmp_path.iterdir()) == []


def test_values_that_no_run_writes_are_not_drawn(tmp_path: Path) -> None:
    sound = [{"step": step, "tokens": step, "loss": 1.0, "held_out_nll": 2.0} for step in range(3)]
    odd: list[Any] = ["\x1b[31mred", float("nan"), 10**400, [], None, {"a": 1}]
    names = ("tokens", "loss", "held_out_nll")
    lines = [*sound, *({**line, name: value} for line in sound for name in names for value in odd)]
    plot_curves(lines, tmp_path / "odd.png")
    plot_runs({"a": lines}, tmp_path / "odd-runs.png")
    assert (tmp_path / "odd.png").stat().st_size
    assert (tmp_path / "odd-runs.png").stat().st_size


@pytest.mark.slow
def test_losses_on_other_samples_are_not_joined_and_have_error_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Line]] = []
    drawn = plots.lines

    def watched(axes: Axes, series: Sequence[Line], **style: Any) -> None:  # noqa: ANN401
        seen.append(list(series))
        drawn(axes, series, **style)

    monkeypatch.setattr(plots, "lines", watched)
    few = {"held_out_targets": 10, "held_out_nll_se": 0.25}
    metrics: list[dict[str, Any]] = [
        {"step": 0, "held_out_nll": 2.0, **few},
        {"step": 0, "accuracy": 0.25, "accuracy_low": 0.1, "accuracy_high": 0.4},
        {"step": 20, "held_out_nll": 1.2, **few},
        {"step": 20, "held_out_nll": 1.5, "held_out_targets": 99, "held_out_nll_se": -1.0},
    ]
    assert plot_curves(metrics, tmp_path / "curves.png")
    losses, _, scores = seen
    _, during, after = losses
    assert (list(during.ys), list(during.errors)) == ([2.0, 1.2], [0.25, 0.25])
    assert (list(after.ys), list(after.errors)) == ([1.5], [0.0])
    assert [list(line.ys) for line in scores] == [[0.25], [0.1], [0.4]]

    seen.clear()
    metrics += [{"step": 40, "held_out_nll": 1.8, **few}]
    end = {"step": 40, "is_result": True, "of_step": 20}
    metrics += [{**end, "held_out_nll": 1.2, **few}, {**end, "accuracy": 0.5}]
    assert plot_curves(metrics, tmp_path / "best.png")
    (_, during, after), _, scores = seen
    assert (list(during.xs), list(during.ys)) == ([0, 20, 40], [2.0, 1.2, 1.8])
    assert (list(after.xs), list(after.ys)) == ([20, 20], [1.5, 1.2])
    assert [list(line.xs) for line in scores[:2]] == [[0], [20]]

    watched_levels: list[Any] = []
    monkeypatch.setattr(
        plots, "lines", lambda axes, series, **style: watched_levels.append(style.get("levels"))
    )
    plot_curves(metrics[2:], tmp_path / "cut.png")
    assert watched_levels[0] == {}, "the loss of the base is not there"
