"""Sweeps: several runs with other settings, trained side by side from one read of the data."""

import itertools
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from carryon.cache.errors import InputError, MissingError
from carryon.cache.files import write_json
from carryon.train.config import Changes, StreamSettings, TrainSettings, change
from carryon.train.plots import plot_runs
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.run_dir import RunFolder
from carryon.train.trainer.trainer import Job, train_jointly

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


LIST_SEPARATOR = "+"
"""Between the elements of one value of a list setting: taps=final,final+layer.15."""


def grid(vary: Sequence[str]) -> dict[str, Changes]:
    """Return the runs of a grid, by name: each value of each setting with each of the others.

    Args:
        vary: `NAME=VALUE,VALUE` for each setting; the elements of a list are joined by `+`.

    Raises:
        InputError: a setting is unknown, or a value is not of its type.
    """
    axes = []
    for text in vary:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise InputError(f"vary: expected NAME=VALUE,VALUE, got {text!r}")
        name = name.lstrip("-").replace("-", "_")
        axes.append([(name, _value(name, value)) for value in values.split(",")])
    names = [axis[0][0] for axis in axes]
    if len(set(names)) != len(names):
        raise InputError(f"vary: expected each setting once, got {' '.join(names)}")
    combinations = [dict(combination) for combination in itertools.product(*axes)]
    return {name_of(changes): changes for changes in combinations if changes}


def read_runs(path: str) -> dict[str, Changes]:
    """Return the runs that a YAML file lists: changed settings, and a `name` if one is wanted.

    Raises:
        MissingError: there is no such file.
        InputError: it is not a list of such, or two runs have one name.
    """
    try:
        listed = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingError(f"{path}: expected a YAML list of runs, found no file") from error
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise InputError(f"{path}: expected a list of runs, each `setting: value` lines")
    runs: dict[str, Changes] = {}
    for item in listed:
        changes = {
            str(key).replace("-", "_"): value for key, value in item.items() if key != "name"
        }
        changes = {key: _typed(key, value) for key, value in changes.items()}
        name = str(item.get("name") or name_of(changes))
        if name in runs or re.search(r"[/\\]|^\.", name):
            raise InputError(f"{path}: expected another name for each run, got {name!r} again")
        runs[name] = changes
    return runs


def name_of(changes: Changes) -> str:
    """Return the name of a run: its changed settings."""
    return ",".join(f"{key}={_shown(value)}" for key, value in changes.items()) or "unchanged"


def _kinds() -> dict[str, Any]:
    """Return the type of every setting."""
    return {
        name: kind
        for part in typing.get_type_hints(TrainSettings).values()
        for name, kind in typing.get_type_hints(part).items()
    }


def _value(name: str, text: str) -> Any:  # noqa: ANN401 -- each setting has its own type
    kind = _kinds().get(name)
    if typing.get_origin(kind) is list:
        return _typed(name, text.split(LIST_SEPARATOR))
    return _typed(name, text)


def _typed(name: str, value: Any) -> Any:  # noqa: ANN401 -- each setting has its own type
    """Return `value` as the setting `name` has it; YAML takes 1e-3 for a text."""
    kind = _kinds().get(name)
    if kind is None:
        known = ", ".join(sorted(_kinds()))
        raise InputError(f"sweep: no setting {name}: expected some of {known}")
    if typing.get_origin(kind) is list:
        values = value if isinstance(value, list) else [value]
        return [_as(name, item, typing.get_args(kind)[0]) for item in values]
    return _as(name, value, kind)


def _as(name: str, value: Any, kind: Any) -> Any:  # noqa: ANN401 -- each setting has its own type
    if typing.get_origin(kind) is typing.Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}
        if str(value) not in choices:
            raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value}")
        return choices[str(value)]
    if kind is bool:
        if str(value).lower() not in ("true", "false", "yes", "no"):
            raise InputError(f"{name}: expected yes or no, got {value}")
        return str(value).lower() in ("true", "yes")
    try:
        return kind(str(value))
    except ValueError as error:
        raise InputError(f"{name}: expected {kind.__name__}, got {value!r}") from error


def _shown(value: Any) -> str:  # noqa: ANN401 -- each setting has its own type
    if isinstance(value, list):
        return LIST_SEPARATOR.join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
