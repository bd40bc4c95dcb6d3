"""The report of a comparison: which method to take, a table, plots, and figures."""

import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

from carryon.cache.files.atomic import write_file
from carryon.tools.cli.table import format_table
from carryon.tools.compare.figure import Figure
from carryon.tools.compare.settings import CONTROLS
from carryon.train.plots import Axes, Line, Point, draw, lines, points

logger = logging.getLogger(__name__)

_MUCH_ABOVE = 0.02
"""Nats that a run may end above its lowest point without a note."""
_NLL = "held-out loss, nats"

Rows = list[dict[str, Any]]
Key = tuple[float, str, str]
"""Seconds, run and method: rows of one key differ in their seeds."""
Groups = Mapping[Key, Rows]


def report(folder: Path, rows: Rows) -> list[Figure]:
    """Write report, plots and figures beside the rows, log the report; return the figures."""
    groups: dict[Key, Rows] = defaultdict(list)
    for row in rows:
        if row["run"] != "sweep":
            groups[float(row["seconds"]), row["run"], row["method"]].append(row)
    groups = dict(sorted(groups.items(), key=lambda item: (item[0][0], _nll(item[1]))))
    sweeps = [row for row in rows if row["run"] == "sweep"]
    text = "\n".join(
        [*_advice(groups), "", format_table(_table(groups), is_markdown=True), "", *_notes(groups)]
        + [
            f"Learning rate {row['learning_rate']:g} of {row['method']}: {row['nll']:.4f} in "
            f"{row['train_s']:.0f} s."
            for row in sweeps
        ]
    )
    write_file(folder / "report.md", (text.rstrip() + "\n").encode())
    for line in text.splitlines():
        logger.info(line)
    _plot(groups, folder)
    figures = [*_differences(groups), *_break_even(groups), *_speeds(groups)]
    documents = [json.dumps(figure.to_dict()) + "\n" for figure in figures]
    write_file(folder / "figures.jsonl", "".join(documents).encode())
    return figures


def _nll(rows: Rows) -> float:
    return fmean(float(row["nll"]) for row in rows)


def _spread(rows: Rows) -> float:
    nlls = [float(row["nll"]) for row in rows]
    return (max(nlls) - min(nlls)) / 2


def _advice(groups: Groups) -> Iterator[str]:
    """Yield which method to take in each time, and with a finished store."""
    row = next(iter(groups.values()))[0]
    base, data = row["base_nll"], row["data"]
    yield (
        f"Base alone: {base:.4f} nats per token, on {data['held_out_targets']:,} held-out targets. "
        "Lower is better."
    )
    for seconds in sorted({key[0] for key in groups}):
        runs: dict[str, dict[str, Rows]] = {"first": {}, "second": {}}
        for (budget, run, method), rows in groups.items():
            if budget == seconds and method not in CONTROLS:
                runs[run][method] = rows
        best, *others = sorted(runs["first"], key=lambda name: _nll(runs["first"][name])) or [""]
        reached = _nll(runs["first"][best]) if best else base
        if best and reached >= base:
            yield f"In {seconds:g} s from text, no method improves on the base: give more time."
        elif best:
            yield f"In {seconds:g} s from text take {best}: {reached:.4f}" + (
                _versus(best, others[0], runs["first"]) if others else "."
            )
        stored = min(runs["second"], key=lambda name: _nll(runs["second"][name]), default="")
        if stored and (loss := _nll(runs["second"][stored])) < min(reached, base):
            extraction_s = runs["second"][stored][0]["extraction"]["seconds"]
            yield (
                f"In {seconds:g} s with a finished store take {stored}: {loss:.4f}; its extraction "
                f"takes {extraction_s:,.0f} s, once."
            )


def _versus(best: str, other: str, runs: Mapping[str, Rows]) -> str:
    gap = _nll(runs[other]) - _nll(runs[best])
    text = f", {gap:.4f} below {other}."
    if len(runs[best]) == 1:
        return f"{text} One seed: --seeds 0 1 2 shows the noise."
    is_noise = gap <= _spread(runs[best]) + _spread(runs[other])
    return f"{text} The seeds differ as much: take either." if is_noise else text


def _table(groups: Groups) -> list[tuple[str, ...]]:
    table: list[tuple[str, ...]] = [
        ("method", "seconds", "store", "loss", "+-", "to ship MB", "extraction s", "tokens seen")
        + ("tokens/s", "learning rate", "peak MB", "seeds")
    ]
    for (seconds, run, method), rows in groups.items():
        has_store = bool(rows[0]["extraction"]["tokens"])
        cells = (
            f"{_nll(rows):.4f}",
            f"{_spread(rows):.4f}" if len(rows) > 1 else "",
            f"{rows[0]['ship_bytes'] / 1e6:.2f}",
            f"{fmean(row['extraction']['seconds'] for row in rows):,.0f}" if has_store else "",
            f"{fmean(row['tokens'] for row in rows):,.0f}",
            f"{fmean(row['tokens_per_second'] for row in rows):,.0f}",
            ", ".join(f"{rate:g}" for rate in dict.fromkeys(row["learning_rate"] for row in rows)),
            f"{fmean(row['peak_bytes'] for row in rows) / 1e6:,.0f}",
            " ".join(str(row["seed"]) for row in rows),
        )
        made = {"first": "in this time", "second": "before"}[run] if has_store else "none"
        table.append((method, f"{seconds:g}", made, *cells))
    return table


def _notes(groups: Groups) -> Iterator[str]:
    """Yield a line for each run that ended well above its lowest loss."""
    for row in (row for rows in groups.values() for row in rows):
        lowest = min(row["curve"], key=lambda point: float(point["nll"]))
        above = row["nll"] - lowest["nll"]
        if above > _MUCH_ABOVE:
            why = (
                f"it read the same text {row['epochs']} times: give more text or less time"
                if row["epochs"] > 1
                else "try a lower learning rate"
            )
            yield (
                f"{row['method']}, {row['run']} run of {row['seconds']:g} s, seed {row['seed']}, "
                f"ended {above:.3f} above its loss at {lowest['clock_s']:.0f} s; {why}."
            )


def _differences(groups: Groups) -> Iterator[Figure]:
    """Yield LoRA's loss minus that of the best carry-on, for each budget and run."""
    for (seconds, _, method), rows in groups.items():
        if method != "lora":
            continue
        lora = {row["seed"]: row["nll"] for row in rows}
        for run in ("first", "second"):
            gains = {
                key[2]: [lora[row["seed"]] - row["nll"] for row in ours if row["seed"] in lora]
                for key, ours in groups.items()
                if key[:2] == (seconds, run) and _is_carryon(key[2], ours)
            }
            gains = {name: values for name, values in gains.items() if values}
            if not gains:
                continue
            best = max(gains, key=lambda name: fmean(gains[name]))
            yield Figure(
                figure=f"compare.{run}_run.{seconds:g}s",
                value=min(gains[best]),
                sense="at least",
                unit="nats below LoRA, worst seed",
                details={
                    "best": best,
                    "mean": fmean(gains[best]),
                    "seeds": gains[best],
                    "lora_nll": fmean(lora.values()),
                    "others": {x: fmean(gains[x]) for x in gains if x != best},
                },
            )


def _is_carryon(method: str, rows: Rows) -> bool:
    return bool(rows[0]["extraction"]["tokens"]) and method not in CONTROLS


def _break_even(groups: Groups) -> Iterator[Figure]:
    """Yield the number of runs after which extraction has paid for itself, for each method.

    1 if a first run ends no higher than LoRA's in the same time. Otherwise a run on the store
    counts until it reaches LoRA's final loss.
    """
    for (seconds, run, method), rows in groups.items():
        lora = groups.get((seconds, "first", "lora"))
        if lora is None or not _is_carryon(method, rows):
            continue
        wanted = _nll(lora)
        first = groups.get((seconds, "first", method))
        is_won_at_once = first is not None and _nll(first) <= wanted
        details: dict[str, Any] = {"lora_nll": wanted, "lora_run_s": seconds}
        if run == "first" and is_won_at_once:
            runs, details = 1.0, {**details, "first_run_nll": _nll(rows)}
        elif run == "second" and not is_won_at_once:
            own = [others for key, others in groups.items() if key[1:] == ("second", method)]
            needed_s = min(_seconds_to(others, wanted) for others in own)
            if needed_s >= seconds:
                continue
            extraction_s = rows[0]["extraction"]["seconds"]
            runs = extraction_s / (seconds - needed_s)
            details |= {"extraction_s": extraction_s, "run_s": needed_s}
        else:
            continue
        yield Figure(
            figure=f"compare.break_even.{method}.{seconds:g}s",
            value=runs,
            unit="runs",
            details=details,
        )


def _seconds_to(rows: Rows, wanted: float) -> float:
    """Return the seconds until a run is at `wanted` or below, the mean over the seeds."""
    return fmean(
        min((x["clock_s"] for x in row["curve"] if x["nll"] <= wanted), default=float("inf"))
        for row in rows
    )


def _speeds(groups: Groups) -> Iterator[Figure]:
    """Yield the training speed of each method relative to LoRA, in tokens/s."""
    speeds: dict[str, list[float]] = defaultdict(list)
    for (_, _, method), rows in groups.items():
        speeds[method] += [row["tokens_per_second"] for row in rows]
    lora = median(speeds.pop("lora", [0.0]))
    for method, own in speeds.items() if lora else ():
        yield Figure(
            figure=f"compare.speed.{method}",
            value=median(own) / lora,
            sense="at least",
            unit="of LoRA's tokens/s",
            details={"tokens_per_second": median(own), "lora": lora},
        )


def _plot(groups: Groups, folder: Path) -> None:
    """Draw the curves of all runs, and the final losses by size and by time."""
    methods = sorted({key[2] for key in groups})
    curves: dict[str, list[Line]] = {"clock_s": [], "tokens": []}
    marks: dict[str, list[Point]] = {"seconds": [], "size": []}
    for (seconds, run, method), rows in groups.items():
        color = f"C{methods.index(method) % 10}"
        for axis, series in curves.items():
            for number, row in enumerate(rows):
                # A first run's curve begins after its extraction.
                start = row["extraction"]["seconds"] if (run, axis) == ("first", "clock_s") else 0
                label = "" if number else f"{method}, {run} run of {seconds:g} s"
                series.append(
                    Line(
                        xs=[max(point[axis], start) for point in row["curve"]],
                        ys=[point["nll"] for point in row["curve"]],
                        label=label,
                        color=color,
                        is_dashed=run == "second",
                    )
                )
        marker = "o" if run == "first" else "^"
        for axis, x in (("seconds", seconds), ("size", rows[0]["ship_bytes"] / 1e6)):
            label = f"{method}, {run} run of {seconds:g} s"
            marks[axis].append(Point(x=x, y=_nll(rows), label=label, color=color, marker=marker))

    def by_clock(axes: Axes) -> None:
        lines(axes, curves["clock_s"], x_label="seconds, extraction included", y_label=_NLL)

    def by_tokens(axes: Axes) -> None:
        lines(axes, curves["tokens"], x_label="tokens seen", y_label=_NLL)

    def by_seconds(axes: Axes) -> None:
        points(axes, marks["seconds"], x_label="seconds, extraction included", y_label=_NLL)

    def by_size(axes: Axes) -> None:
        points(axes, marks["size"], x_label="megabytes to ship", y_label=_NLL, is_log_x=True)

    draw(folder / "curves.png", by_clock, by_tokens, shares_y=True)
    # With one budget all points would have the same seconds.
    panels = [by_seconds, by_size] if len({key[0] for key in groups}) > 1 else [by_size]
    draw(folder / "pareto.png", *panels, shares_y=True)
