"""The result of experiment-teacher: figures, table.md and table.json. Pure but for the files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from carryon.cache.files.atomic import write_file
from carryon.cache.files.documents import write_json
from carryon.tools.cli.table import format_table
from carryon.tools.compare.figure import Figure

NO_TEACHER, BARE, OWN = "no-teacher", "bare", "carryon"
STUDENT = "student"
LEAST_GAIN = 1e-4
"""Nats a target: what is more than nothing in the digits of the table."""
HEADING = ("arm", "held-out NLL, best step", "mean", "at the end", "best steps")
_NAMES = {STUDENT: "student alone", BARE: "teacher alone", OWN: "teacher with its carry-on"}
Runs = Mapping[tuple[int, str], Mapping[str, Any]]
"""(seed, arm) -> losses of a run."""


def arm_name(kind: str, weight: float) -> str:
    """Return the name of an arm: its kind, and the teacher's weight."""
    return kind if kind == NO_TEACHER else f"{kind}-{weight:g}"


def figures_of(
    runs: Runs, *, weights: Sequence[float], seeds: Sequence[int], details: Mapping[str, Any]
) -> list[Figure]:
    """Return what each teacher gains with each weight at the best step, the least of the seeds."""

    def gains(arm: str, key: str) -> list[float]:
        return [runs[seed, NO_TEACHER][key] - runs[seed, arm][key] for seed in seeds]

    figures = []
    for kind, name, target in ((OWN, "gain", LEAST_GAIN), (BARE, "bare_gain", None)):
        for weight in weights:
            arm = arm_name(kind, weight)
            values = gains(arm, "best_nll")
            figures.append(
                Figure(
                    figure=f"teacher.{name}",
                    value=min(values),
                    unit="nats a held-out target below no teacher, least of the seeds",
                    target=target,
                    sense="at least",
                    details={
                        "weight": weight,
                        "values": values,
                        "values_at_the_end": gains(arm, "last_nll"),
                        "seeds": list(seeds),
                        **details,
                    },
                )
            )
    return figures


def write_report(
    folder: Path,
    runs: Runs,
    bases: Mapping[str, Mapping[str, Any]],
    figures: Sequence[Figure],
    facts: Mapping[str, Any],
) -> str:
    """Write the table as Markdown and JSON, and return it as text.

    Args:
        folder: to write into.
        runs: of all seeds and arms.
        bases: losses of the student and of both teachers, none of which has a seed.
        figures: of the runs.
        facts: about the experiment, to be named below the table.
    """
    rows = [
        (_NAMES[name], "", f"{each['held_out_nll']:.4f}", "", "") for name, each in bases.items()
    ]
    for arm in dict.fromkeys(arm for _, arm in runs):
        own = [run for (_, name), run in runs.items() if name == arm]
        rows.append(
            (
                arm,
                ", ".join(f"{run['best_nll']:.4f}" for run in own),
                f"{mean(run['best_nll'] for run in own):.4f}",
                ", ".join(f"{run['last_nll']:.4f}" for run in own),
                ", ".join(f"{run['best_step']} of {run['last_step']}" for run in own),
            )
        )
    told = [
        f"- {each.figure}, weight {each.details['weight']:g}: {each.value:.4f} {each.unit}"
        + ("" if each.met is None else f"; more than 0: {'met' if each.met else 'missed'}")
        for each in figures
    ]
    told += [
        f"- {_NAMES[name]}, at the training targets: {each['train_nll']:.4f}"
        for name, each in bases.items()
        if "train_nll" in each
    ]
    told += [f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()]
    table = format_table([HEADING, *rows], is_markdown=True)
    write_file(folder / "table.md", "\n".join([table, "", *told, ""]).encode())
    document = {
        "runs": [{"seed": seed, "arm": arm, **run} for (seed, arm), run in runs.items()],
        "bases": {name: dict(each) for name, each in bases.items()},
        "figures": [figure.to_dict() for figure in figures],
        **facts,
    }
    write_json(folder / "table.json", document)
    return "\n".join([table, *told])
