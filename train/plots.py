"""Plots as PNG files in one style: lines and labelled points.

matplotlib is imported when something is drawn, and needs no display. Without it nothing is
written but a log line that says how to install it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from carryon.cache.errors import MissingExtraError
from carryon.cache.files.atomic import whole_file
from carryon.cache.optional import require

logger = logging.getLogger(__name__)

Axes = Any  # of matplotlib, which is optional
NLL_LABEL = "nats per supervised token"
FEW_POINTS = 12
"""Lines of fewer points have markers on them."""

_LARGEST = 1e30


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of a plot."""

    xs: Sequence[float]
    ys: Sequence[float]
    label: str = ""
    """Name in the legend. Empty: not in the legend."""
    color: str = ""
    """As in matplotlib. Empty: the next of the cycle."""
    is_dashed: bool = False
    is_faint: bool = False
    """Thin and pale, for raw values behind a line that matters more."""
    errors: Sequence[float] = ()
    """Half the height of the bar at each point. Empty: no bars."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A labelled point of a plot."""

    x: float
    y: float
    label: str
    """Text beside the point."""
    color: str = "C0"
    marker: str = "o"


def draw(
    path: Path,
    *panels: Callable[[Axes], None],
    width: float = 8.0,
    height: float = 4.5,
    shares_y: bool = False,
) -> bool:
    """Write a PNG of one or more panels, side by side; return whether it was written.

    Args:
        path: the PNG, written atomically.
        panels: functions that call `lines` or `points` on the axes that they receive.
        width: of a panel, in inches.
        height: in inches.
        shares_y: whether all panels have the same y axis.
    """
    try:
        require("matplotlib", extra="plot", purpose=f"the plot {path.name}")
    except MissingExtraError as error:
        logger.warning(f"no plot: {error}")
        return False
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width * len(panels), height), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=shares_y, squeeze=False)
    for axes, panel in zip(grid[0], panels, strict=True):
        panel(axes)
        axes.grid(alpha=0.2)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    return True


def lines(
    axes: Axes,
    series: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    levels: Mapping[str, float] | None = None,
    is_from_zero: bool = False,
) -> None:
    """Draw lines, and a gray horizontal one for each of `levels`, dotted or dashed by turns."""
    for line in series:
        axes.plot(
            list(line.xs),
            list(line.ys),
            label=line.label or None,
            color=line.color or None,
            linestyle="--" if line.is_dashed else "-",
            linewidth=0.8 if line.is_faint else None,
            alpha=0.4 if line.is_faint else None,
            marker="o" if len(line.xs) < FEW_POINTS and not line.is_faint else None,
            markersize=4,
        )
        if line.errors:
            axes.errorbar(
                list(line.xs),
                list(line.ys),
                yerr=list(line.errors),
                fmt="none",
                ecolor=axes.get_lines()[-1].get_color(),
                elinewidth=0.8,
                capsize=2,
            )
    for (name, level), style in zip((levels or {}).items(), cycle((":", "-."))):
        axes.axhline(level, linestyle=style, color="gray", label=name)
    axes.set(xlabel=x_label, ylabel=y_label)
    if all(isinstance(x, int) for line in series for x in line.xs):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if is_from_zero:
        axes.set(ylim=(0, None))


def points(
    axes: Axes, marks: Sequence[Point], *, x_label: str, y_label: str, is_log_x: bool = False
) -> None:
    """Draw points with their labels beside them; the x axis may be logarithmic."""
    for mark in marks:
        axes.scatter([mark.x], [mark.y], color=mark.color, marker=mark.marker)
        axes.annotate(
            mark.label, (mark.x, mark.y), fontsize=7, xytext=(5, 3), textcoords="offset points"
        )
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.margins(x=0.4, y=0.1)  # room for the labels
    if is_log_x:
        axes.set_xscale("log")
        axes.xaxis.get_minor_locator().set_params(subs=(2, 5))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")


def plot_curves(metrics: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the losses and the learning rate of a run against its steps."""
    during, after = _evaluations([_at_its_step(line) for line in metrics])
    losses = [
        _line(metrics, "step", "loss", label="training loss", is_faint=True),
        _line(during, "step", "held_out_nll", label="held-out NLL", color="C1", has_errors=True),
    ]
    if after:
        label = "held-out NLL, all samples"
        losses.append(
            _line(after, "step", "held_out_nll", label=label, color="C2", has_errors=True)
        )
    has_base = bool(during) and during[0].get("step") == 0
    levels = {"base, held out": during[0]["held_out_nll"]} if has_base else {}
    rate = _line(metrics, "step", "learning_rate", color="gray", is_faint=True)

    def panel(axes: Axes) -> None:
        lines(axes, losses, x_label="step", y_label=NLL_LABEL, levels=levels)
        lines(axes.twinx(), [rate], x_label="step", y_label="learning rate (gray)")

    panels = [panel]
    if shares := _gate_shares(during):
        panels.append(lambda axes: lines(axes, shares, x_label="step", y_label="gate share"))
    scores = _line(
        [line for line in metrics if "of_step" not in line],
        "step",
        "accuracy",
        label="right answers",
    )
    of_best = [_at_its_step(line) for line in metrics if "of_step" in line]
    best = _line(of_best, "step", "accuracy", label="of the best step", color="C2")
    if not scores.xs and not best.xs:
        return draw(path, *panels)
    ends = [
        _line(metrics, "step", f"accuracy_{end}", color="gray", is_dashed=True, label=label)
        for end, label in (("low", "95 % interval"), ("high", ""))
    ]

    def score_panel(axes: Axes) -> None:
        lines(
            axes,
            [scores, *([best] if best.xs else []), *ends],
            x_label="step",
            y_label="fraction of problems",
        )
        axes.set(ylim=(0, 1))

    return draw(path, *panels, score_panel)


def plot_runs(metrics: Mapping[str, Sequence[dict[str, Any]]], path: Path) -> bool:
    """Draw the losses of several runs, by name, against the tokens that they have seen.

    A faint line is a run's training loss, the line of its colour its held-out NLL.
    """
    series = []
    for number, (name, run) in enumerate(metrics.items()):
        color = f"C{number % 10}"
        # Lines of evaluations have no tokens: those of the step are taken.
        tokens = {0: 0} | {line["step"]: line["tokens"] for line in run if "tokens" in line}
        known = [
            {"tokens": tokens[line["step"]]} | line for line in run if line.get("step") in tokens
        ]
        series += [
            _line(known, "tokens", "loss", color=color, is_faint=True),
            _line(_evaluations(known)[0], "tokens", "held_out_nll", label=name, color=color),
            _line(_evaluations(known)[1], "tokens", "held_out_nll", color=color),
        ]
    return draw(
        path, lambda axes: lines(axes, series, x_label="tokens", y_label=NLL_LABEL), height=6
    )


def plot_paths(rates: Mapping[str, Sequence[float]], path: Path, *, every: int = 1) -> bool:
    """Draw learning rates against the steps, by name; each value is that of `every` steps."""
    series = [
        Line(xs=range(1, every * len(values) + 1, every), ys=values, label=name)
        for name, values in rates.items()
    ]
    style: dict[str, Any] = {"x_label": "step", "y_label": "learning rate", "is_from_zero": True}
    return draw(path, lambda axes: lines(axes, series, **style))


def _gate_shares(evaluations: Sequence[dict[str, Any]]) -> list[Line]:
    """Return the share of each base of a mixture over the steps; none without a gate."""
    rows = []
    for line in evaluations:
        mixture = line.get("mixture")
        shares = mixture.get("gate_shares") if isinstance(mixture, dict) else None
        if isinstance(shares, dict):
            rows.append({"step": line.get("step")} | {f"of {key}": shares[key] for key in shares})
    names = list(dict.fromkeys(name for row in rows for name in row if name != "step"))
    return [_line(rows, "step", name, label=name.removeprefix("of ")) for name in names[:10]]


def _evaluations(
    metrics: Sequence[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the evaluations on the samples of the first one, and those on others.

    A line does not join the losses of other samples: the step between them is none of the run's.
    """
    lines = [line for line in metrics if _is_drawn(line.get("held_out_nll"))]
    first = lines[0].get("held_out_targets") if lines else None
    same = [
        line for line in lines if line.get("held_out_targets") == first and "of_step" not in line
    ]
    return same, [line for line in lines if line not in same]


def _at_its_step(line: dict[str, Any]) -> dict[str, Any]:
    """Return the line of a result at the step whose weights it is of: a point of its own."""
    return {**line, "step": line["of_step"]} if _is_drawn(line.get("of_step")) else line


def _line(
    metrics: Sequence[dict[str, Any]],
    x: str,
    y: str,
    *,
    has_errors: bool = False,
    **style: Any,  # noqa: ANN401 -- fields of Line
) -> Line:
    drawn = [line for line in metrics if _is_drawn(line.get(x)) and _is_drawn(line.get(y))]
    given = [line.get(f"{y}_se") for line in drawn] if has_errors else []
    errors = [float(each) if each and _is_drawn(each) else 0.0 for each in given]
    return Line(
        xs=[line[x] for line in drawn],
        ys=[line[y] for line in drawn],
        errors=[max(0.0, each) for each in errors],
        **style,
    )


def _is_drawn(value: object) -> bool:
    """Tell whether a value from a file can stand on an axis; others would be drawn as text."""
    return isinstance(value, int | float) and -_LARGEST < value < _LARGEST
