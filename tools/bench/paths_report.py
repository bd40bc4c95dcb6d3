"""The report of a comparison of paradigms: tables, plots and figures from its result files."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import write_json
from carryon.tools.bench.path_plan import NO_SCHEDULE, Lengths, steps_by_formula
from carryon.tools.bench.path_runs import PathRuns
from carryon.tools.cli.table import format_table
from carryon.tools.compare.figure import Figure
from carryon.train.optim.lr_paths import BRANCH_SCHEDULES, PARADIGMS, path_rate
from carryon.train.plots import Line, draw, lines, plot_paths

DEFAULT_ALPHA = 0.6
_ENOUGH = 0.95
"""Part of the largest gain of a decay over none that the recommended alpha must reach."""
_NLL = "held-out NLL on all data so far"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """The versions of one paradigm, for all seeds that have every version."""

    label: str
    kind: str
    alpha: float
    seeds: dict[int, list[Row]]
    """Results of all versions, by seed."""

    @property
    def num_versions(self) -> int:
        """Number of versions."""
        return len(next(iter(self.seeds.values())))

    def nlls(self, number: int) -> dict[int, float]:
        """Return the NLL of a version on all data so far, by seed."""
        return {seed: float(rows[number - 1]["nll"]) for seed, rows in self.seeds.items()}

    def mean(self, number: int) -> float:
        """Return a version's mean NLL over the seeds."""
        return statistics.fmean(self.nlls(number).values())

    def cost(self, name: str) -> float:
        """Return a cost of all versions, the mean over the seeds: steps, targets or train_s."""
        return statistics.fmean(sum(row[name] for row in rows) for rows in self.seeds.values())


def read_results(root: Path) -> list[Row]:
    """Return every result in an experiment's folder."""
    paths = sorted((root / "results").glob("*.json"))
    return [json.loads(path.read_text(encoding="ascii")) for path in paths]


def series_of(
    results: Sequence[Row], kind: str, schedule: str, *, alpha: float | None = None
) -> list[Series]:
    """Return the complete series of a paradigm, one for each alpha."""
    schedule = NO_SCHEDULE if kind in ("trunk", "wsm") else schedule
    mine = [row for row in results if (row["kind"], row["schedule"]) == (kind, schedule)]
    series = []
    for value in sorted({row["alpha"] for row in mine}):
        rows = [row for row in mine if row["alpha"] == value]
        last = max(row["version"] for row in results)
        seeds = {
            seed: sorted(
                (row for row in rows if row["seed"] == seed), key=lambda row: int(row["version"])
            )
            for seed in sorted({row["seed"] for row in rows})
        }
        whole = {seed: each for seed, each in seeds.items() if len(each) == last}
        if whole and alpha in (None, value):
            label = f"{kind} {value:g}" if value else kind
            series.append(Series(label=label, kind=kind, alpha=value, seeds=whole))
    return series


def figures_of(name: str, results: Sequence[Row]) -> list[Figure]:
    """Return the figures of an experiment: loss differences of the last version, and costs.

    Differences are taken seed by seed. The target is the seeds' spread: the largest minus the
    smallest NLL of the last version from scratch.
    """
    return [
        replace(figure, figure=f"paths.{name}.{schedule}.{figure.figure}")
        for schedule in BRANCH_SCHEDULES
        for figure in _figures(results, schedule)
    ]


def _figures(results: Sequence[Row], schedule: str) -> Iterator[Figure]:
    series = {
        kind: one
        for kind in PARADIGMS
        for one in series_of(results, kind, schedule)
        if one.alpha in (0, DEFAULT_ALPHA)
    }
    if switch := series.get("switch"):
        last = switch.num_versions
        if "scratch" in series:
            yield from _against_scratch(switch, series["scratch"], last)
        if "restart" in series and "low" in series:
            both = [series[kind].nlls(last) for kind in ("restart", "low")]
            better = {
                seed: min(nlls[seed] for nlls in both) for seed in set(both[0]) & set(both[1])
            }
            if differences := _differences(switch.nlls(last), better):
                yield Figure(
                    figure="switch_minus_better_continual",
                    value=max(differences),
                    unit="nats, worst seed",
                    details={"differences": differences},
                )
                yield Figure(
                    figure="switch_below_better_continual",
                    value=sum(difference < 0 for difference in differences),
                    unit=f"of {len(differences)} seeds",
                    target=len(differences),
                    sense="at least",
                )
        for kind in ("wsd-s", "wsm", "trunk"):
            theirs = series[kind].nlls(last) if kind in series else {}
            if differences := _differences(switch.nlls(last), theirs):
                yield Figure(
                    figure=f"switch_minus_{kind}",
                    value=statistics.fmean(differences),
                    unit="nats",
                    details={"differences": differences},
                )
    curve = alpha_curve(results, schedule)
    if len(curve) > 2:
        yield Figure(
            figure="recommended_alpha",
            value=recommend(curve),
            unit="of an increment",
            details={"nll_by_alpha": {f"{alpha:g}": nll for alpha, nll in curve.items()}},
        )


def _against_scratch(switch: Series, scratch: Series, last: int) -> Iterator[Figure]:
    theirs = scratch.nlls(last)
    spread = max(theirs.values()) - min(theirs.values())
    if differences := _differences(switch.nlls(last), theirs):
        yield Figure(
            figure="switch_minus_scratch",
            value=statistics.fmean(differences),
            unit="nats",
            target=spread,
            details={
                "differences": differences,
                "spread": spread,
                "switch": switch.mean(last),
                "scratch": scratch.mean(last),
            },
        )
    yield Figure(
        figure="steps_of_switch",
        value=switch.cost("steps") / scratch.cost("steps"),
        unit="of scratch",
        details={
            "by_formula": _steps_ratio("switch", last, DEFAULT_ALPHA),
            "targets": switch.cost("targets") / scratch.cost("targets"),
            "seconds": switch.cost("train_s") / scratch.cost("train_s"),
        },
    )


def _differences(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Return ours minus theirs for each common seed."""
    return [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]


def alpha_curve(results: Sequence[Row], schedule: str) -> dict[float, float]:
    """Return the last version's NLL by alpha, over common seeds; 0 is the trunk."""
    series = [*series_of(results, "trunk", schedule), *series_of(results, "switch", schedule)]
    if not series:
        return {}
    common = set.intersection(*(set(one.seeds) for one in series))
    return {
        one.alpha: statistics.fmean(one.nlls(one.num_versions)[seed] for seed in common)
        for one in series
        if common
    }


def recommend(curve: dict[float, float]) -> float:
    """Return the smallest alpha that reaches most of the largest gain over the trunk."""
    undecayed = curve[0.0]
    largest = undecayed - min(curve.values())
    return min(alpha for alpha, nll in curve.items() if undecayed - nll >= _ENOUGH * largest)


def write_report(experiment: PathRuns, results: Sequence[Row], lengths: Lengths) -> None:
    """Write the tables, the plots and the raw results into the experiment's folder."""
    root = experiment.root
    write_json(root / "paths.json", {"results": list(results)})
    text = "\n\n".join(table for each in BRANCH_SCHEDULES if (table := _table(results, each)))
    write_file(root / "paths.md", f"{text}\n".encode())
    for schedule in BRANCH_SCHEDULES:
        series = [one for kind in PARADIGMS for one in series_of(results, kind, schedule)]
        shown = [one for one in series if one.alpha in (0, DEFAULT_ALPHA)]
        if not any(one.kind not in ("trunk", "wsm") for one in shown):
            continue
        versions = range(1, shown[0].num_versions + 1)
        nlls = [
            Line(xs=versions, ys=[one.mean(each) for each in versions], label=one.label)
            for one in shown
        ]
        _plot(root / f"nll-{schedule}.png", nlls, x_label="version", y_label=_NLL)
        costs = [
            Line(xs=[one.cost("steps")], ys=[one.mean(versions[-1])], label=one.label)
            for one in series
        ]
        last = f"{_NLL}, last version"
        _plot(root / f"cost-{schedule}.png", costs, x_label="steps of all versions", y_label=last)
        curve = alpha_curve(results, schedule)
        if len(curve) > 2:
            alphas = [Line(xs=list(curve), ys=list(curve.values()), label=schedule)]
            _plot(root / f"alpha-{schedule}.png", alphas, x_label="alpha", y_label=last)
        plot_paths(_rates(experiment, shown, schedule, lengths), root / f"rates-{schedule}.png")


def _plot(path: Path, series: Sequence[Line], **labels: str) -> None:
    draw(path, lambda axes: lines(axes, series, **labels), width=9.0)  # type: ignore[arg-type]


def _rates(
    experiment: PathRuns, series: Sequence[Series], schedule: str, lengths: Lengths
) -> dict[str, list[float]]:
    settings = replace(experiment.settings.optimization, schedule=schedule)  # type: ignore[arg-type]
    ends = [sum(lengths.alone[: index + 1]) for index in range(len(lengths.alone))]
    return {
        one.label: [
            path_rate(
                step,
                paradigm=one.kind,  # type: ignore[arg-type]
                version=len(ends),
                ends=ends,
                alpha=DEFAULT_ALPHA,
                settings=settings,
            )
            for step in range(ends[-1])
        ]
        for one in series
        if one.kind != "wsm"
    }


def _table(results: Sequence[Row], schedule: str) -> str:
    """Return the table of a schedule; empty if no paradigm with results depends on it."""
    series = [one for kind in PARADIGMS for one in series_of(results, kind, schedule)]
    scratch = next((one for one in series if one.kind == "scratch"), None)
    if not any(one.kind not in ("trunk", "wsm") for one in series):
        return ""
    versions = range(1, series[0].num_versions + 1)
    names = [*(f"v{each}" for each in versions), "sd", *(f"on {each}" for each in versions)]
    rows = [["paradigm", "seeds", *names, "steps", "/ scratch", "formula", "s"]]
    for one in series:
        last = list(one.nlls(versions[-1]).values())
        parts = zip(*(seed[-1]["nlls"] for seed in one.seeds.values()), strict=True)
        rows.append(
            [
                one.label,
                str(len(one.seeds)),
                *(f"{one.mean(each):.4f}" for each in versions),
                f"{statistics.stdev(last):.4f}" if len(last) > 1 else "",
                *(f"{statistics.fmean(part):.4f}" for part in parts),
                f"{one.cost('steps'):.0f}",
                f"{one.cost('steps') / scratch.cost('steps'):.3f}" if scratch else "",
                f"{_steps_ratio(one.kind, len(versions), one.alpha):.3f}",
                f"{one.cost('train_s'):.0f}",
            ]
        )
    return (
        f"### {schedule}: {_NLL}, mean over seeds\n\n{format_table(rows, is_markdown=True)}\n\n"
        f"`on k`: v{versions[-1]} on increment k; sd: of v{versions[-1]} over the seeds."
    )


def _steps_ratio(kind: str, versions: int, alpha: float) -> float:
    ours = steps_by_formula(kind, versions=versions, steps=1, alpha=alpha)  # type: ignore[arg-type]
    return float(ours / steps_by_formula("scratch", versions=versions, steps=1, alpha=alpha))
