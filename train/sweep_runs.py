"""The runs of a sweep: from a grid or a file to names, each with the settings that it changes."""

import itertools
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from carryon.cache.errors import InputError, MissingError
from carryon.train.run import TrainSettings

LIST_SEPARATOR = "+"
"""Between the elements of one value of a list setting: taps=final,final+layer.15."""

Changes = dict[str, Any]
"""Settings of one run that differ from those of the others, by name."""


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
