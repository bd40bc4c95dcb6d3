"""A measured figure: its value, its target, whether that was met; as a JSON line and as a table."""

import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One measured number."""

    figure: str
    """Name, such as `stream.synthetic.warm`."""
    value: float
    unit: str
    target: float | None = None
    """None: there is no target, the number is for information."""
    sense: Literal["at most", "at least"] = "at most"
    """On which side of the target a good value lies."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else was measured on the way, plain JSON values."""

    @property
    def met(self) -> bool | None:
        """Whether the value reaches the target; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.sense == "at most" else self.value >= self.target

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the details stand beside the rest."""
        return {
            "figure": self.figure,
            "value": _rounded(self.value),
            "target": self.target,
            "sense": self.sense,
            "unit": self.unit,
            "met": self.met,
            **{name: _rounded(value) for name, value in self.details.items()},
        }


Report = Callable[[Figure], None]
"""What a measurement calls with each figure as soon as it is known."""


def print_json(figure: Figure) -> None:
    """Print one JSON line to stdout at once, so that a run cut short keeps what it has."""
    print(json.dumps(figure.to_dict()), flush=True)


def print_table(figures: Sequence[Figure]) -> None:
    """Print all figures as a table to stderr, those with a target first."""
    ordered = sorted(figures, key=lambda figure: figure.target is None)
    rows = [("figure", "value", "target", "unit", "met")]
    rows += [
        (item.figure, _shown(item.value), _target(item), item.unit, _answer(item.met))
        for item in ordered
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip(), file=sys.stderr)


def in_turn(ways: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, float]:
    """Run each way once a round, in turn, and return the median of what each returned.

    Whatever else the machine does then falls on all of them alike.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        names = list(ways) if number % 2 == 0 else list(ways)[::-1]
        for name in names:
            found[name].append(ways[name]())
    return {name: statistics.median(values) for name, values in found.items()}


def _target(figure: Figure) -> str:
    if figure.target is None:
        return ""
    return f"{'<=' if figure.sense == 'at most' else '>='} {_shown(figure.target)}"


def _answer(met: bool | None) -> str:
    return {None: "", True: "yes", False: "NO"}[met]


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _rounded(value: Any) -> Any:  # noqa: ANN401 -- any JSON value
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
