"""Sweeps: several runs with other settings, trained side by side from one read of the data."""

import itertools
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from carryon.cache.errors import InputError, MissingError
from carryon.cache.files.documents import FILES, sealed, write_json
from carryon.cache.files.regular import digest_file, refuse_links
from carryon.train.config import Changes, MixSettings, StreamSettings, TrainSettings, parse_changes
from carryon.train.data.datasets import StorePaths, store_paths
from carryon.train.plots import plot_runs
from carryon.train.settings_file import read_yaml
from carryon.train.trainer.distributed import join_processes
from carryon.train.trainer.finish import TrainReport
from carryon.train.trainer.metrics import read_metrics
from carryon.train.trainer.run import Job
from carryon.train.trainer.run_dir import RunFolder, open_to_write
from carryon.train.trainer.trainer import train_jointly

SUMMARY = "sweep.json"
CURVES = "curves.png"
_MAX_NAME_BYTES = 200
LIST_SEPARATOR = "+"
"""Between the items of one value of a list setting: taps=final,final+layer.15."""
Runs = Mapping[str, Changes] | str | Path | None
"""Name of each run -> the settings in which it differs; or a YAML file that lists them."""
Vary = Mapping[str, Sequence[Any]] | Sequence[str] | None
"""Values of each setting of a grid; or a text NAME=VALUE,VALUE for each setting."""


def sweep(
    store: StorePaths,
    *,
    out: str | Path,
    runs: Runs = None,
    vary: Vary = None,
    settings: TrainSettings | None = None,
    **options: Any,  # noqa: ANN401
) -> list[TrainReport]:
    """Train several runs side by side from one read of the store, each in `out`/NAME.

    Each ends with the bits that `train` gives with its settings. `out`/sweep.json lists the
    reports, `out`/curves.png draws the losses. After a kill the same call resumes.

    Example:
        reports = sweep("store", out="sweep", vary={"learning_rate": [1e-3, 3e-3]}, epochs=5)

    Args:
        store: folder of the store or an open store, or several of them.
        out: folder of the sweep; made if missing.
        runs: the runs, by name.
        vary: instead of `runs`, the values of each setting, which make a grid.
        settings: common to the runs. None: the defaults.
        options: fields of TrainSettings' groups by name, changed in `settings`.

    Raises:
        InputError: a setting is unknown, or must be the same in all runs.
        StoreBusyError: another process trains in `out` or in one of the runs.
        KeyboardInterrupt: Ctrl-C; every run has a checkpoint, and the same call resumes.
    """
    runs = choose_runs(runs, vary)
    root = Path(out)
    jobs = plan_jobs(root, (settings or TrainSettings()).with_options(**options), runs)
    paths, processes = store_paths(store), join_processes(jobs[0].settings.run.device)
    for job in jobs:  # a run's own folder may be a link, but not one in a folder of others
        refuse_links(root, Path(job.out))
    with open_to_write(root, kind="sweep") if processes.is_first else nullcontext():
        reports = train_jointly(paths, jobs)
        if processes.is_first:
            rows = [
                {"run": name, "changes": changes, **report.to_dict()}
                for (name, changes), report in zip(runs.items(), reports, strict=True)
            ]
            metrics = {name: read_metrics(RunFolder(root / name).metrics) for name in runs}
            plot_runs(metrics, root / CURVES)
            plot = root / CURVES  # there is none without matplotlib
            files = {CURVES: digest_file(plot)} if plot.is_file() else {}
            write_json(root / SUMMARY, sealed({"runs": rows, FILES: files}))
    return reports


def choose_runs(runs: Runs, vary: Vary) -> dict[str, Changes]:
    """Return the runs that `sweep` is given, by name.

    Raises:
        InputError: both or neither are given, or a setting is unknown.
    """
    if bool(vary) == bool(runs):
        given = "both" if vary else "neither"
        raise InputError(f"sweep: expected runs or vary (--runs or --vary), got {given}")
    if vary:
        return grid(vary)
    return read_runs(runs) if isinstance(runs, (str, Path)) else dict(runs or {})


def plan_jobs(root: Path, settings: TrainSettings, runs: Mapping[str, Changes]) -> list[Job]:
    """Return the runs of a sweep with all their settings; nothing is written.

    Raises:
        InputError: a setting is unknown, or must be the same in all runs.
    """
    jobs = [
        Job(out=str(root / name), settings=settings.with_options(**changes))
        for name, changes in runs.items()
    ]
    shared = [item.name for group in (StreamSettings, MixSettings) for item in fields(group)]
    shared.append("device")
    first = jobs[0].settings.to_flat()
    for name, job in zip(runs, jobs, strict=True):
        flat = job.settings.to_flat()
        for key in shared:
            if flat[key] != first[key]:
                raise InputError(
                    f"{key}: expected one value for all runs, which share one read of the store, "
                    f"got {first[key]} and in {name} {flat[key]}. Fix: one sweep for each value"
                )
    return jobs


def grid(vary: Mapping[str, Sequence[Any]] | Sequence[str]) -> dict[str, Changes]:
    """Return the runs of a grid by name: each value of each setting with each of the others.

    Raises:
        InputError: a setting is unknown or given twice, or a value is not of its type.
    """
    pairs = list(vary.items()) if isinstance(vary, Mapping) else [_values_of(text) for text in vary]
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise InputError(f"vary: expected each setting once, got {' '.join(names)}")
    runs = (
        parse_changes(dict(zip(names, values, strict=True)))
        for values in itertools.product(*(values for _, values in pairs))
    )
    named: dict[str, Changes] = {}
    for changes in runs:
        name = name_of(changes)
        _check_name(name)
        if name in named:
            raise InputError(f"vary: expected runs that differ, got two of the name {name!a:.80}")
        named[name] = changes
    return named


def read_runs(path: str | Path) -> dict[str, Changes]:
    """Return the runs that a YAML file lists: changed settings, and optionally a `name`.

    Raises:
        MissingError: there is no such file.
        InputError: it lists something else, or two runs have the same name.
    """
    try:
        listed = read_yaml(Path(path))
    except FileNotFoundError as error:
        raise MissingError(f"{path}: expected a YAML list of runs, got no file") from error
    except OSError as error:
        raise InputError(
            f"{path}: expected a YAML list of runs, got what cannot be read: {error.strerror}"
        ) from error
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise InputError(f"{path}: expected a list of runs, each `setting: value` lines")
    runs: dict[str, Changes] = {}
    for item in listed:
        options = {str(key).replace("-", "_"): value for key, value in item.items()}
        name = options.pop("name", None)
        changes = parse_changes(options)
        name = str(name or name_of(changes))
        if name in runs or re.search(r"[/\\]|^\.", name):
            raise InputError(f"{path}: expected a new name for each run, got {name!r}")
        _check_name(name)
        runs[name] = changes
    return runs


def name_of(changes: Changes) -> str:
    """Return the name of a run: its changed settings."""
    return ",".join(f"{key}={_shown(value)}" for key, value in changes.items()) or "unchanged"


def _check_name(name: str) -> None:
    """Refuse a name that no folder can have."""
    if len(name.encode()) > _MAX_NAME_BYTES:
        raise InputError(
            f"run {name!a:.60}: expected a name of at most {_MAX_NAME_BYTES} bytes, got "
            f"{len(name.encode())}. Fix: list the runs in a file for --runs, each with a name"
        )


def _values_of(text: str) -> tuple[str, list[Any]]:
    name, equals, values = text.partition("=")
    if not equals or not values:
        raise InputError(f"vary: expected NAME=VALUE,VALUE, got {text!r}")
    name, each = name.lstrip("-").replace("-", "_"), values.split(",")
    is_list = isinstance(TrainSettings().to_flat().get(name), list)
    return name, [value.split(LIST_SEPARATOR) for value in each] if is_list else each


def _shown(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, list):
        return LIST_SEPARATOR.join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
