"""The curves of runs as a PNG: loss of the steps, held-out NLL, learning rate."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from carryon.cache.errors import MissingExtraError
from carryon.cache.optional import require


def plot_curves(metrics: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the metrics of a run to `path`; returns whether it was drawn.

    Without matplotlib nothing is written but one line on stderr that says how to get it.
    """
    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "held_out_nll" in line]
    figure = begin_plot(width=8, height=5)
    if figure is None:
        return False
    axes = figure.add_subplot()
    axes.plot(_column(steps, "step"), _column(steps, "loss"), alpha=0.5, label="training loss")
    axes.plot(
        _column(evaluations, "step"),
        _column(evaluations, "held_out_nll"),
        marker="o",
        label="held-out NLL",
    )
    for line in evaluations[:1]:
        axes.axhline(line["held_out_nll"], linestyle=":", color="gray", label="base, held out")
    axes.set(xlabel="step", ylabel="nats per supervised token")
    rate = axes.twinx()
    rate.plot(_column(steps, "step"), _column(steps, "learning_rate"), color="tab:green", alpha=0.4)
    rate.set_ylabel("learning rate", color="tab:green")
    axes.legend(loc="upper right")
    save_plot(figure, path)
    return True


def plot_runs(metrics: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> bool:
    """Draw the metrics of several runs, by name, to `path`; returns whether it was drawn.

    A thin line is a run's training loss, dots of its colour its held-out NLL, over the tokens
    that it has seen.
    """
    figure = begin_plot(width=9, height=6)
    if figure is None:
        return False
    axes = figure.add_subplot()
    for number, (name, lines) in enumerate(metrics.items()):
        color = f"C{number % 10}"
        steps = [line for line in lines if "loss" in line]
        seen = {0: 0} | {line["step"]: line["tokens"] for line in steps}
        evaluations = [
            line for line in lines if line.get("step") in seen and "held_out_nll" in line
        ]
        axes.plot(
            _column(steps, "tokens"), _column(steps, "loss"), color=color, alpha=0.3, linewidth=0.8
        )
        axes.plot(
            [seen[line["step"]] for line in evaluations],
            _column(evaluations, "held_out_nll"),
            color=color,
            marker="o",
            markersize=3,
            label=name,
        )
    axes.set(xlabel="tokens", ylabel="nats per supervised token")
    axes.legend(loc="upper right", fontsize="small")
    save_plot(figure, path)
    return True


def plot_paths(rates: Mapping[str, Sequence[float]], path: Path) -> bool:
    """Draw learning rates over the steps, by name, to `path`; returns whether it was drawn."""
    lines = {name: (range(1, len(values) + 1), values) for name, values in rates.items()}
    return plot_lines(lines, path, x_label="step", y_label="learning rate", is_from_zero=True)


def plot_lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: Path,
    *,
    x_label: str,
    y_label: str,
    is_from_zero: bool = False,
) -> bool:
    """Draw lines of x and y, by name, to `path`; returns whether it was drawn.

    Lines of few points have dots on them.
    """
    figure = begin_plot(width=9, height=4)
    if figure is None:
        return False
    axes = figure.add_subplot()
    for name, (xs, ys) in lines.items():
        axes.plot(list(xs), list(ys), label=name, marker="o" if len(xs) < 12 else None)
    axes.set(xlabel=x_label, ylabel=y_label)
    if all(isinstance(x, int) for xs, _ in lines.values() for x in xs):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if is_from_zero:
        axes.set(ylim=(0, None))
    axes.legend(loc="best", fontsize="small")
    save_plot(figure, path)
    return True


def begin_plot(*, width: float, height: float) -> Any:  # noqa: ANN401 -- matplotlib is optional
    """Return an empty matplotlib figure, in inches; None, and a line on stderr, without it."""
    if not _can_draw():
        return None
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _can_draw() -> bool:
    try:
        require("matplotlib", extra="plot", purpose="the plot of the curves")
    except MissingExtraError as error:
        print(f"no plot: {error}", file=sys.stderr)
        return False
    return True


def save_plot(figure: Any, path: Path) -> None:  # noqa: ANN401 -- matplotlib is optional
    """Write a figure as a PNG, whole or not at all."""
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=120, format="png")
    partial.rename(path)


def _column(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float(line[name]) for line in lines]
