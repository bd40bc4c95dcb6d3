"""The curves of a run as a PNG: loss of the steps, held-out NLL, learning rate."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carryon.cache.errors import MissingExtraError
from carryon.cache.extras import require


def plot_curves(metrics: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the metrics of a run to `path`; returns whether it was drawn.

    Without matplotlib nothing is written but one line on stderr that says how to get it.
    """
    try:
        require("matplotlib", extra="plot", purpose="the plot of the curves")
    except MissingExtraError as error:
        print(f"no plot: {error}", file=sys.stderr)
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
    figure.savefig(path, dpi=120)
    return True


def _column(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float(line[name]) for line in lines]
