"""The report of experiment-cot: table.md, table.json and accuracy.png."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import write_json
from carryon.tools.bench.accuracy.rows import Row
from carryon.train.inference.scoring.comparison import Paired
from carryon.train.plots import draw

HEADING = (
    "task",
    "arm",
    "right, each seed",
    "mean, 95 %",
    "cut",
    "won/lost against the base",
    "won/lost against the best prompt",
    "MB",
    "held-out NLL",
    "extraction s",
    "training s",
    "clock s",
)


def write_report(folder: Path, rows: Sequence[Row], facts: dict[str, Any]) -> bool:
    """Write the table as Markdown and JSON, and the plot; return whether it was drawn.

    Args:
        folder: of the experiment.
        rows: of all tasks.
        facts: of the experiment: base, seeds, processor.
    """
    write_json(folder / "table.json", {**facts, "rows": [row.to_dict() for row in rows]})
    cells = [HEADING, ("---",) * len(HEADING), *map(cells_of, rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    told = [f"- {name}: {value}" for name, value in facts.items()]
    write_file(folder / "table.md", "\n".join([*lines, "", *told, ""]).encode())
    panels = [_panel(task, list(each)) for task, each in groupby(rows, key=lambda row: row.task)]
    return draw(folder / "accuracy.png", *panels, width=3.6, shares_y=True)


def cells_of(row: Row) -> list[str]:
    """Return the cells of a row."""
    cells = [
        row.task,
        row.arm,
        f"{', '.join(map(str, row.right))} of {row.problems}",
        f"{row.accuracy:.1%} [{row.low:.1%}, {row.high:.1%}]",
        f"{row.cut:.0%}",
        "-" if row.arm == "base" else _shown(row.against_base),
        _shown(row.against_prompt),
    ]
    costs = row.costs
    if not costs.bytes:
        return [*cells, "-", "-" if costs.nll is None else f"{costs.nll:.3f}", "-", "-", "-"]
    seconds = [f"{each:,.0f}" for each in (costs.extract_s, costs.train_s, costs.clock_s)]
    return [*cells, f"{costs.bytes / 1e6:.2f}", f"{costs.nll:.3f}", *seconds]


def _shown(paired: Paired) -> str:
    return f"{paired.won}/{paired.lost}, p {paired.p:.2g}"


def _panel(task: str, rows: Sequence[Row]) -> Callable[[Any], None]:
    """Return what draws the accuracy of each arm with its interval."""

    def panel(axes: Any) -> None:  # noqa: ANN401 -- of matplotlib, which is optional
        heights = [row.accuracy for row in rows]
        ends = [
            [max(0.0, row.accuracy - row.low) for row in rows],
            [max(0.0, row.high - row.accuracy) for row in rows],
        ]
        colors = ["C0" if row.costs.bytes else "0.7" for row in rows]
        places = list(range(len(rows)))
        axes.bar(places, heights, yerr=ends, color=colors, capsize=3)
        axes.set_xticks(places, [row.arm for row in rows], rotation=40, ha="right")
        axes.set(title=task, ylabel="accuracy", ylim=(0, 1))

    return panel
