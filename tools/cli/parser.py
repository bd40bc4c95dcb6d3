"""The command line of a typed function: from words to the arguments of a call.

`--unit-tokens` and `--unit_tokens` are the same option. An option of list type takes several
values, `--taps final layer.15`, and may be repeated. `--config FILE` reads a YAML file of
options by their names, `--print-config` writes one. Nothing here knows any subcommand.
"""

import argparse
import difflib
import inspect
import json
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, ArgumentError, ArgumentParser, Namespace

from carryon.cache.errors import InputError
from carryon.tools.cli.logs import LEVELS
from carryon.tools.cli.options import REQUIRED, Option, is_settings, options_of
from carryon.train.config import PRESETS


def parse_call(
    function: Callable[..., Any], argv: Sequence[str], *, prog: str
) -> tuple[inspect.BoundArguments, str]:
    """Return the arguments with which `argv` asks for `function` to be called, and the log level.

    Prints and exits 0 on `--help` and `--print-config`.

    Raises:
        InputError: an option is unknown, missing or of the wrong type, or settings contradict.
    """
    options = options_of(function)
    parser = build_parser(function, options, prog=prog)
    try:
        values = parser.parse_args(normalize(argv, options))
    except ArgumentError as error:
        raise InputError(explain(str(error), options, prog=prog)) from error
    level = "warning" if values["quiet"] else values["log_level"]
    return bind(function, values), level


def bind(function: Callable[..., Any], values: Namespace) -> inspect.BoundArguments:
    """Return `values` as arguments of `function`, its dataclasses built from their fields."""
    kinds = typing.get_type_hints(function)
    positional, named = [], {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = kinds[name]
        if is_settings(kind):
            value = kind(**{item.name: values[item.name] for item in fields(kind)})
        else:
            value = values[name]
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        else:
            named[name] = value
    return inspect.signature(function).bind(*positional, **named)


def build_parser(
    function: Callable[..., Any], options: Sequence[Option], *, prog: str
) -> ArgumentParser:
    """Return the parser of `options`; its help is the function's docstring up to `Args:`."""
    required = [_usage(item) for item in options if item.default is REQUIRED]
    parser = ArgumentParser(
        prog=prog,
        usage=" ".join([prog, *required, "[options]"]),
        description=(inspect.getdoc(function) or "").partition("\nArgs:\n")[0],
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print-config",
    )
    groups: dict[str | None, Any] = {None: parser}
    for item in options:
        if item.heading not in groups:
            groups[item.heading] = parser.add_argument_group(item.heading)
        _add(groups[item.heading], item)
    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file of options, by their names; for training also a preset: "
        f"{', '.join(PRESETS)}.",
    )
    parser.add_argument(
        "--quiet", action=ActionYesNo(no_prefix="no-"), default=False, help="Show warnings only."
    )
    parser.add_argument(
        "--log-level",
        type=typing.Literal[LEVELS],
        default="info",
        help="Least important messages to show on stderr. (default: info)",
    )
    return parser


def normalize(argv: Sequence[str], options: Sequence[Option]) -> list[str]:
    """Return `argv` as jsonargparse wants it: dashes in names, lists as one JSON value.

    Example: `--taps final layer.15` becomes `--taps=["final", "layer.15"]`, and a second
    `--taps prenorm` after it `--taps+=["prenorm"]`, which appends.
    """
    flags = {item.flag: item for item in options if not item.is_positional}
    result: list[str] = []
    seen: set[str] = set()
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if name == "--config" and (equals or rest):
            given = value if equals else rest.pop(0)
            result.append(f"--config={config_path(given)}")
            continue
        option = flags.get(name)
        if option is None or not option.is_list:
            result.append(name + equals + value)
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if not values:
            result.append(name)  # the parser says that a value is missing
            continue
        result.append(f"{name}{'+' if name in seen else ''}={_json_list(values, option)}")
        seen.add(name)
    return result


def config_path(given: str) -> str:
    """Return the file that `--config` names: a path, or a preset if there is no such file."""
    is_preset = given in PRESETS and not Path(given).exists()
    return str(PRESETS[given]) if is_preset else given


def explain(message: str, options: Sequence[Option], *, prog: str) -> str:
    """Return an error of the parser as one line, in the words of the command line."""
    flags = {item.name: item.name if item.is_positional else item.flag for item in options}
    line = " ".join(message.split())
    line = re.sub(r'^Parser key "(\w+)":', lambda m: f"{flags.get(m[1], '--' + m[1])}:", line)
    line = re.sub(r"^argument (-[\w-]+)\S*:", r"\1:", line)
    line = re.sub(r"Expected an? <class '(\w+)'>\. Got value: ", r"expected \1, got ", line)
    line = re.sub(
        r"Expected an? typing\.Literal\[(.*?)\]\. Got value: ",
        lambda m: f"expected one of {m[1].replace(chr(39), '')}, got ",
        line,
    )
    if missing := re.fullmatch(r"the following arguments are required: (.*)", line):
        named = [flags.get(name, name) for name in missing[1].split(", ")]
        line = f"expected {', '.join(named)}, got nothing"
    if unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", line):
        near = difflib.get_close_matches(unknown[1], flags.values(), n=1)
        line = f"no option {unknown[1]}" + (f", did you mean {near[0]}?" if near else "")
    return f"{line}: see {prog} --help".replace("?:", "?")


def _add(group: argparse._ActionsContainer, item: Option) -> None:
    settings: dict[str, Any] = {"help": _help(item)}
    if item.is_positional:
        group.add_argument(item.name, type=item.kind, metavar=item.name.upper(), **settings)
        return
    if item.default is REQUIRED:
        settings["required"] = True
    else:
        settings["default"] = item.default
    if item.kind is bool:
        settings["action"] = ActionYesNo(no_prefix="no-")
    else:
        settings["type"] = item.kind
        if typing.get_origin(item.kind) is not typing.Literal:
            settings["metavar"] = _metavar(item)
    group.add_argument(item.flag, **settings)


def _help(item: Option) -> str:
    text = " ".join(item.help.split()).replace("%", "%%")
    if item.default is REQUIRED:
        return text if item.is_positional else f"{text} (required)"
    if item.default in (None, "", [], ()):
        return text
    if isinstance(item.default, bool):
        return f"{text} (default: {'yes' if item.default else 'no'})"
    shown = " ".join(map(str, item.default)) if item.is_list else str(item.default)
    return f"{text} (default: {shown})"


def _metavar(item: Option) -> str:
    kind = typing.get_args(item.kind)[0] if item.is_list else item.kind
    name = {int: "N", float: "X"}.get(kind, item.name.upper())
    return f"{name} [{name} ...]" if item.is_list else name


def _usage(item: Option) -> str:
    return item.name.upper() if item.is_positional else f"{item.flag} {_metavar(item)}"


def _json_list(values: list[str], option: Option) -> str:
    if len(values) == 1 and values[0].startswith("["):
        return values[0]
    if typing.get_args(option.kind)[0] is str:
        return json.dumps(values)
    return "[" + ", ".join(values) + "]"


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's own, without the `--name+` forms that jsonargparse adds to lists."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return re.sub(r", --\S+\+ [^,]*", "", super()._format_action_invocation(action))
