"""Sweeps: several runs with other settings, trained side by side from one read of the data."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

from carryon.cache.atomic import write_json
from carryon.cache.errors import InputError
from carryon.train.config import StreamSettings
from carryon.train.loop import Job, train_jointly
from carryon.train.metrics import read_metrics
from carryon.train.plots import plot_runs
from carryon.train.report import TrainReport
from carryon.train.run import TrainSettings
from carryon.train.run_folder import RunFolder
from carryon.train.sweep_runs import Changes

SUMMARY = "sweep.json"
CURVES = "curves.png"


def sweep(
    *, store: str | Sequence[str], out: str, settings: TrainSettings, runs: Mapping[str, Changes]
) -> list[TrainReport]:
    """Train every run of a sweep, each in a folder of its name below `out`.

    Each ends with the bits that `train` gives with its settings. `out`/sweep.json sums them up,
    `out`/curves.png shows them. After a kill the same call goes on.

    Args:
        store: folder of the store, or of each store.
        out: folder of the sweep.
        settings: what the runs have in common.
        runs: name of each run and the settings in which it differs.

    Raises:
        InputError: a setting is unknown, or must be the same in all runs.
        KeyboardInterrupt: Ctrl-C; every run has a checkpoint, and the same call goes on.
    """
    paths = [store] if isinstance(store, str) else list(store)
    jobs = plan_jobs(out, settings, runs)
    reports = train_jointly(paths, jobs)
    root = Path(out)
    rows = [
        {"run": name, "changes": changes, **report.to_dict()}
        for (name, changes), report in zip(runs.items(), reports, strict=True)
    ]
    write_json(root / SUMMARY, {"runs": rows})
    metrics = {name: read_metrics(RunFolder(root=root / name).metrics) for name in runs}
    plot_runs(metrics, root / CURVES)
    return reports


def plan_jobs(out: str, settings: TrainSettings, runs: Mapping[str, Changes]) -> list[Job]:
    """Return the runs of a sweep with all their settings; nothing is written.

    Raises:
        InputError: there is no run, a setting is unknown, or must be the same in all runs.
    """
    if not runs:
        raise InputError("sweep: expected at least one run, got none: give --vary or --runs")
    jobs = [
        Job(out=str(Path(out) / name), settings=change(settings, changes))
        for name, changes in runs.items()
    ]
    first = jobs[0].settings
    for name, job in zip(runs, jobs, strict=True):
        shared = {
            item.name: (getattr(first.stream, item.name), getattr(job.settings.stream, item.name))
            for item in fields(StreamSettings)
        } | {"device": (first.run.device, job.settings.run.device)}
        for key, (expected, got) in shared.items():
            if expected != got:
                raise InputError(
                    f"{key}: expected one value for all runs, as they share one read of the "
                    f"store, got {expected} and in {name} {got}: give each its own sweep"
                )
    return jobs


def change(settings: TrainSettings, changes: Changes) -> TrainSettings:
    """Return `settings` with some of them changed.

    Raises:
        InputError: there is no setting of that name.
    """
    parts = {}
    unknown = set(changes)
    for part in fields(TrainSettings):
        before = getattr(settings, part.name)
        mine = {item.name for item in fields(before)} & set(changes)
        parts[part.name] = replace(before, **{name: changes[name] for name in sorted(mine)})
        unknown -= mine
    if unknown:
        known = sorted(settings.to_flat())
        raise InputError(
            f"sweep: no setting {', '.join(sorted(unknown))}: expected some of {', '.join(known)}"
        )
    return TrainSettings(**parts)
