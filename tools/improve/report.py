"""The result of all rounds: a table, and a plot of accuracy by round."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from carryon.tools.cli.table import format_table

STEPS = ("sample", "extract", "train", "score")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A model on the test set."""

    name: str
    round: int
    """0 for the base."""
    records: int
    """Of all corpora up to this round."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Step -> seconds."""
    problems: int
    right: float
    accuracy: float
    low: float
    """Lower end of the 95 % interval."""
    high: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def read_scores(documents: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return arm -> problems, right, accuracy and interval, over all tasks of `carryon score`."""
    from carryon.train.inference.scoring.comparison import wilson_interval

    sums: dict[str, list[float]] = {}
    for document in documents:
        for arm in document["arms"]:
            both = sums.setdefault(arm["arm"], [0.0, 0.0])
            both[0] += arm["problems"]
            both[1] += arm["right"]
    scores = {}
    for arm, (problems, right) in sums.items():
        low, high = wilson_interval(right, int(problems))
        scores[arm] = {"problems": problems, "right": right, "accuracy": right / problems}
        scores[arm] |= {"low": low, "high": high}
    return scores


def format_rows(rows: Sequence[Row]) -> str:
    """Return the table of all rounds."""
    heading = ["round", "records", *(f"{name} s" for name in STEPS), "right", "accuracy", "95 %"]
    cells = [heading]
    for row in rows:
        seconds = [f"{row.seconds[name]:,.0f}" if name in row.seconds else "-" for name in STEPS]
        cells.append(
            [
                row.name if len(row.name) <= 40 else f"{row.name[:37]}...",
                f"{row.records:,}",
                *seconds,
                f"{row.right:g} of {row.problems}",
                f"{row.accuracy:.1%}",
                f"{row.low:.1%} to {row.high:.1%}",
            ]
        )
    return format_table(cells)


def plot_rounds(rows: Sequence[Row], path: Path) -> bool:
    """Draw accuracy by round with its interval; dotted lines are the base."""
    from carryon.train.plots import Line, draw, lines

    rounds = [row for row in rows if row.round]
    xs = [row.round for row in rounds]
    series = [
        Line(xs=xs, ys=[row.accuracy for row in rounds], label="with carry-on", color="C0"),
        Line(xs=xs, ys=[row.low for row in rounds], label="95 %", color="C0", is_faint=True),
        Line(xs=xs, ys=[row.high for row in rounds], color="C0", is_faint=True),
    ]
    levels = {row.name: row.accuracy for row in rows if not row.round}
    return draw(
        path,
        lambda axes: lines(
            axes, series, x_label="round", y_label="accuracy", levels=levels, is_from_zero=True
        ),
    )
