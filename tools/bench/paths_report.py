"""The report of a comparison of paradigms: tables, plots and figures, from its result files."""

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from carryon.cache.files import write_file, write_json
from carryon.tools.bench.path_cost import steps_by_formula
from carryon.tools.bench.path_plan import NO_SCHEDULE, Lengths
from carryon.tools.bench.path_runs import PathRuns
from carryon.tools.compare.figure import Figure
from carryon.train.optim.lr_paths import BRANCH_SCHEDULES, PARADIGMS, path_rate
from carryon.train.plots import plot_lines, plot_paths

DEFAULT_ALPHA = 0.6
_ENOUGH = 0.95
"""Part of the largest gain of a fall over none that an alpha must bring to be recommended."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """The versions of one way of releasing them, for all seeds that have every version."""

    label: str
    kind: str
    alpha: float
    seeds: dict[int, list[Row]]
    """By seed, a result for each version."""

    @property
    def num_versions(self) -> int:
        """Versions of every seed."""
        return len(next(iter(self.seeds.values())))

    def nlls(self, number: int) -> dict[int, float]:
        """Return the NLL of a version on all data so far, by seed."""
        return {seed: float(rows[number - 1]["nll"]) for seed, rows in self.seeds.items()}

    def mean(self, number: int) -> float:
        """Return the mean over the seeds of a version's NLL."""
        return statistics.fmean(self.nlls(number).values())

    def paid(self, what: str) -> float:
        """Return what all versions took, the mean over the seeds."""
        return statistics.fmean(sum(row[what] for row in rows) for rows in self.seeds.values())


def read_results(root: Path) -> list[Row]:
    """Return every result in an experiment's folder."""
    paths = sorted((root / "results").glob("*.json"))
    return [json.loads(path.read_text(encoding="ascii")) for path in paths]


def series_of(
    results: Sequence[Row], kind: str, schedule: str, *, alpha: float | None = None
) -> list[Series]:
    """Return the series of a paradigm, one for each alpha; without those no seed has whole."""
    schedule = NO_SCHEDULE if kind in ("trunk", "wsm") else schedule
    mine = [row for row in results if (row["kind"], row["schedule"]) == (kind, schedule)]
    found = []
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
            found.append(Series(label=label, kind=kind, alpha=value, seeds=whole))
    return found


def figures_of(name: str, results: Sequence[Row]) -> list[Figure]:
    """Return the figures of an experiment: losses of the last version against each other, costs.

    A difference is taken seed by seed. The seeds' spread is the largest less the smallest NLL of
    the last version from scratch over the seeds.
    """
    return [
        replace(figure, figure=f"paths.{name}.{schedule}.{figure.figure}")
        for schedule in BRANCH_SCHEDULES
        for figure in _figures(results, schedule)
    ]


def _figures(results: Sequence[Row], schedule: str) -> Iterator[Figure]:
    found = {
        kind: one
        for kind in PARADIGMS
        for one in series_of(results, kind, schedule)
        if one.alpha in (0, DEFAULT_ALPHA)
    }
    if "switch" in found:
        switch, last = found["switch"], found["switch"].num_versions
        if "scratch" in found:
            yield from _against_scratch(switch, found["scratch"], last)
        if "restart" in found and "low" in found:
            both = [found[kind].nlls(last) for kind in ("restart", "low")]
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
            theirs = found[kind].nlls(last) if kind in found else {}
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
                "spread_is": "largest less smallest NLL of the last version from scratch",
                "switch": switch.mean(last),
                "scratch": scratch.mean(last),
            },
        )
    yield Figure(
        figure="steps_of_switch",
        value=switch.paid("steps") / scratch.paid("steps"),
        unit="of scratch",
        details={
            "by_formula": _share("switch", last, DEFAULT_ALPHA),
            "targets": switch.paid("targets") / scratch.paid("targets"),
            "seconds": switch.paid("train_s") / scratch.paid("train_s"),
        },
    )


def _differences(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """Return ours less theirs for each seed that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]


def alpha_curve(results: Sequence[Row], schedule: str) -> dict[float, float]:
    """Return the last version's NLL by alpha, over the seeds that have all; 0 is the trunk."""
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
    """Return the smallest alpha that brings most of the largest gain over a trunk without fall."""
    undecayed = curve[0.0]
    largest = undecayed - min(curve.values())
    return min(alpha for alpha, nll in curve.items() if undecayed - nll >= _ENOUGH * largest)


def write_report(experiment: PathRuns, results: Sequence[Row], lengths: Lengths) -> None:
    """Write the tables, the plots and the raw results into the experiment's folder."""
    root = experiment.root
    write_json(root / "paths.json", {"results": list(results)})
    text = "\n".join(line for each in BRANCH_SCHEDULES for line in _tables(results, each))
    write_file(root / "paths.md", (text + "\n".join(_pilots(results)) + "\n").encode())
    for schedule in BRANCH_SCHEDULES:
        series = [one for kind in PARADIGMS for one in series_of(results, kind, schedule)]
        shown = [one for one in series if one.alpha in (0, DEFAULT_ALPHA)]
        if not any(one.kind not in ("trunk", "wsm") for one in shown):
            continue
        versions = range(1, shown[0].num_versions + 1)
        label = "held-out NLL on all data so far"
        plot_lines(
            {one.label: (versions, [one.mean(each) for each in versions]) for one in shown},
            root / f"nll-{schedule}.png",
            x_label="version",
            y_label=label,
        )
        plot_lines(
            {one.label: ([one.paid("steps")], [one.mean(versions[-1])]) for one in series},
            root / f"cost-{schedule}.png",
            x_label="steps of all versions",
            y_label=f"{label}, last version",
        )
        curve = alpha_curve(results, schedule)
        if len(curve) > 2:
            plot_lines(
                {schedule: (list(curve), list(curve.values()))},
                root / f"alpha-{schedule}.png",
                x_label="alpha",
                y_label=f"{label}, last version",
            )
        plot_paths(_rates(experiment, shown, schedule, lengths), root / f"rates-{schedule}.png")


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


def _tables(results: Sequence[Row], schedule: str) -> Iterator[str]:
    series = [one for kind in PARADIGMS for one in series_of(results, kind, schedule)]
    scratch = next((one for one in series if one.kind == "scratch"), None)
    if not any(one.kind not in ("trunk", "wsm") for one in series):
        return
    versions = range(1, series[0].num_versions + 1)
    heads = [f"v{each}" for each in versions]
    own = [f"on {each}" for each in versions]
    yield f"### {schedule}: held-out NLL on all data so far, mean over seeds\n"
    yield from _line(
        ["paradigm", "seeds", *heads, "sd", *own, "steps", "/ scratch", "formula", "s"]
    )
    yield from _line(["---"] * (7 + 2 * len(versions)))
    for one in series:
        last = list(one.nlls(versions[-1]).values())
        parts = zip(*(rows[-1]["nlls"] for rows in one.seeds.values()), strict=True)
        share = f"{one.paid('steps') / scratch.paid('steps'):.3f}" if scratch else ""
        yield from _line(
            [
                one.label,
                str(len(one.seeds)),
                *(f"{one.mean(each):.4f}" for each in versions),
                f"{statistics.stdev(last):.4f}" if len(last) > 1 else "",
                *(f"{statistics.fmean(part):.4f}" for part in parts),
                f"{one.paid('steps'):.0f}",
                share,
                f"{_share(one.kind, len(versions), one.alpha):.3f}",
                f"{one.paid('train_s'):.0f}",
            ]
        )
    yield f"\n`on k`: v{versions[-1]} on increment k; sd: of v{versions[-1]} over the seeds.\n"


def _pilots(results: Sequence[Row]) -> Iterator[str]:
    for kind in ("stage1", "stage2"):
        rows = [row for row in results if row["kind"] == kind]
        if not rows:
            continue
        yield f"\n### {kind}: part of a whole fall in this stage, NLL after each\n"
        yield from _line(["schedule", "part", "seeds", "after stage 1", "after stage 2"])
        yield from _line(["---"] * 5)
        for schedule, part in sorted({(row["schedule"], row["alpha"]) for row in rows}):
            mine = [row for row in rows if (row["schedule"], row["alpha"]) == (schedule, part)]
            after = [[row["nll"] for row in mine if row["version"] == each] for each in (1, 2)]
            means = [f"{statistics.fmean(nlls):.4f}" if nlls else "" for nlls in after]
            yield from _line([schedule, f"{part:g}", str(len(after[1])), *means])


def _line(cells: Sequence[str]) -> Iterator[str]:
    yield f"| {' | '.join(cells)} |"


def _share(kind: str, versions: int, alpha: float) -> float:
    ours = steps_by_formula(kind, versions=versions, steps=1, alpha=alpha)  # type: ignore[arg-type]
    return float(ours / steps_by_formula("scratch", versions=versions, steps=1, alpha=alpha))
