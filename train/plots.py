"""The curves of runs as a PNG: loss of the steps, held-out NLL, learning rate."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from carryon.cache.errors import MissingExtraError
from carryon.cache.extras import require


def plot_curves(metrics: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the metrics of a run to `path`; returns whether it was drawn.

    Without matplotlib nothing is written but one line on stderr that says how to get it.
    """
    if not _can_draw():
        return False
    from matplotlib.figure import Figure

    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "held_out_nll" in line]
    figure = Figure(figsize=(8, 5), layout="constrained")
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
    _save(figure, path)
    return True


def plot_runs(metrics: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> bool:
    """Draw the metrics of several runs, by name, to `path`; returns whether it was drawn.

    A thin line is a run's training loss, dots of its colour its held-out NLL, over the tokens
    that it has seen.
    """
    if not _can_draw():
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
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
    _save(figure, path)
    return True


def plot_paths(rates: Mapping[str, Sequence[float]], path: Path) -> bool:
    """Draw learning rates over the steps, by name, to `path`; returns whether it was drawn."""
    if not _can_draw():
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in rates.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    axes.legend(loc="lower left", fontsize="small")
    _save(figure, path)
    return True


def _can_draw() -> bool:
    try:
        require("matplotlib", extra="plot", purpose="the plot of the curves")
    except MissingExtraError as error:
        print(f"no plot: {error}", file=sys.stderr)
        return False
    return True


def _save(figure: Any, path: Path) -> None:  # noqa: ANN401 -- matplotlib is optional
    partial = path.with_name(f".{path.name}")
    figure.savefig(partial, dpi=120, format="png")
    partial.rename(path)


def _column(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float(line[name]) for line in lines]
