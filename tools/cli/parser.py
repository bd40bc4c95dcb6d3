"""From the words of a command line to the arguments of a typed function.

`--unit-tokens` and `--unit_tokens` are the same option. A list takes several values, as in
`--taps final layer.15`, and may be repeated. `--config FILE` reads options by name from YAML;
the command line wins. Nothing here knows any command.
"""

import argparse
import inspect
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from carryon.cache.checked_settings import choices_of, parse_value
from carryon.cache.errors import InputError
from carryon.tools.cli.options import REQUIRED, Option, is_settings, options_of
from carryon.tools.cli.output import LEVELS
from carryon.train.config import OTHER_NAMES
from carryon.train.saved_settings import with_current_names
from carryon.train.settings_file import PRESETS, read_yaml

_PRESETS = ", ".join(PRESETS)
COMMON = [
    Option(name=name, kind=kind, default=default, help=text, heading="Common")
    for name, kind, default, text in [
        ("config", str, "", f"YAML file of options by name, or a preset: {_PRESETS}."),
        ("print_config", bool, False, "Print all options as YAML for --config, and exit."),
        ("quiet", bool, False, "Show warnings and errors only, and no progress."),
        ("log_level", typing.Literal[LEVELS], "info", "Least severe messages to show."),
    ]
]
"""Options of every command."""
_HELP_COLUMN = 38
_NEGATIVE_NUMBER = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.IGNORECASE)


def parse_call(
    function: Callable[..., Any], argv: Sequence[str], *, prog: str, basic: Collection[str] = ()
) -> tuple[inspect.BoundArguments, str]:
    """Return the arguments for `function` that a command line gives, and the log level.

    Prints and exits with code 0 on `--help`, `--help-all` and `--print-config`.

    Args:
        function: the command.
        argv: words after the command's name.
        prog: the words before them, for help and errors.
        basic: names of the options that `--help` shows. Empty: the function's own parameters.

    Raises:
        InputError: an option is unknown, missing, of the wrong type or out of range.
    """
    own = options_of(function)
    options = {item.name: item for item in [*own, *COMMON]}
    parser = _build_parser(
        options,
        basic=basic or [item.name for item in own if not item.heading],
        shows_all="--help-all" in argv,
        prog=prog,
        about=(inspect.getdoc(function) or "").partition("\nArgs:\n")[0],
    )
    # Names are typed with dashes or underscores; underscores in values stay.
    words = [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in argv]
    namespace, unknown = parser.parse_known_args(words)
    for word in unknown[:1]:
        is_option = word.startswith("-")
        parser.error(_unknown_option(word, options) if is_option else f"unexpected word {word!r}")
    given = vars(namespace)
    if "config" in given:
        given = _read_config(given["config"], options) | given
    values = {name: item.default for name, item in options.items()}
    for name, value in given.items():
        values[name] = parse_value(options[name].flag, value, options[name].kind)
    if values["print_config"]:
        import yaml

        known = {x.name: values[x.name] for x in own if values[x.name] is not REQUIRED}
        print(yaml.safe_dump(known, sort_keys=False), end="")
        raise SystemExit(0)
    if missing := [item.flag for item in own if values[item.name] is REQUIRED]:
        parser.error(f"expected {', '.join(missing)}, got nothing")
    try:
        arguments = _bind(function, values)
    except InputError as error:  # a field is out of range: name it as it is typed
        line = re.sub(r"(^|; )(\w+):", lambda m: f"{m[1]}--{m[2].replace('_', '-')}:", str(error))
        raise InputError(line) from error
    return arguments, "warning" if values["quiet"] else values["log_level"]


def _bind(target: Callable[..., Any], values: Mapping[str, Any]) -> inspect.BoundArguments:
    """Return the arguments of a function or dataclass, dataclasses among them built likewise."""
    kinds = typing.get_type_hints(target)
    bound = inspect.signature(target).bind_partial()
    for name in bound.signature.parameters:
        if is_settings(kinds[name]):
            fields = _bind(kinds[name], values)
            bound.arguments[name] = kinds[name](*fields.args, **fields.kwargs)
        else:
            bound.arguments[name] = values[name]
    return bound


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        line = re.sub(r"^argument ([\w-]+)[^:]*: ", r"\1: ", message)
        raise InputError(f"{line}: see {self.prog} --help".replace("?:", "?"))


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_HELP_COLUMN)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0]
        return super()._format_action_invocation(action)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return str(action.metavar)


def _build_parser(
    options: Mapping[str, Option],
    *,
    basic: Collection[str],
    shows_all: bool,
    prog: str,
    about: str,
) -> argparse.ArgumentParser:
    """Return a parser that keeps values as texts and leaves out what is not given."""
    required = [
        _metavar(item) if item.is_positional else f"{item.flag} {_metavar(item)}"
        for item in options.values()
        if item.default is REQUIRED
    ]
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *required, "[options]"]),
        description=about,
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    parser._negative_number_matcher = _NEGATIVE_NUMBER  # argparse's own does not know -1e-3
    first = parser.add_argument_group("options")
    for name in basic:
        _add_option(first, options[name], is_shown=True)
    first.add_argument("-h", "--help", action="help", help="Show this page and exit.")
    first.add_argument("--help-all", action="help", help="Show the advanced options too.")
    groups: dict[str, Any] = {}
    for name, item in options.items():
        if name not in basic:
            if item.heading not in groups:
                groups[item.heading] = parser.add_argument_group(item.heading or "advanced")
            _add_option(groups[item.heading], item, is_shown=shows_all)
    return parser


def _add_option(group: argparse._ArgumentGroup, item: Option, *, is_shown: bool) -> None:
    settings: dict[str, Any] = {"help": _help(item) if is_shown else argparse.SUPPRESS}
    if item.kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings["metavar"] = _metavar(item)
    if item.is_positional:
        settings["nargs"] = "?"  # it may be in the file of --config
    elif item.is_list:
        settings |= {"nargs": "+", "action": "extend"}
    group.add_argument(item.flag, **settings)


def _help(item: Option) -> str:
    notes = ["required"] * (item.default is REQUIRED and not item.is_positional)
    if typing.get_origin(item.item_kind) is typing.Literal:
        notes.append("|".join(choices_of(item.item_kind)))
    if item.default is True:
        notes.append(f"default: yes; {item.flag.replace('--', '--no-', 1)} turns it off")
    elif item.kind is not bool and item.default not in (None, "", [], (), REQUIRED):
        default = item.default if item.is_list else [item.default]
        notes.append(f"default: {' '.join(map(_shown, default))}")
    return (f"{item.help} ({'; '.join(notes)})" if notes else item.help).replace("%", "%%")


def _shown(value: Any) -> str:  # noqa: ANN401
    return f"{value:g}" if isinstance(value, float) else str(value)


def _metavar(item: Option) -> str:
    name = {int: "N", float: "X"}.get(item.item_kind, item.name.rpartition("_")[2].upper())
    is_choice = typing.get_origin(item.item_kind) is typing.Literal
    return ("CHOICE" if is_choice else name) + (" ..." if item.is_list else "")


def _unknown_option(word: str, options: Mapping[str, Option]) -> str:
    typed = word.partition("=")[0]
    name = typed.lstrip("-").replace("-", "_")
    near = get_close_matches(OTHER_NAMES.get(name, name), options, n=1)
    return f"no option {typed}" + (f", did you mean {options[near[0]].flag}?" if near else "")


def _read_config(given: str, options: Mapping[str, Option]) -> dict[str, Any]:
    """Return the options in a YAML file, or in a preset if there is no such file."""
    path = Path(given)
    if given in PRESETS and not path.exists():
        path = PRESETS[given]
    try:
        document = read_yaml(path)
    except (OSError, InputError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--config: expected a YAML file or one of {_PRESETS}, got {given}: {reason}"
        ) from error
    if not isinstance(document, dict):
        raise InputError(
            f"--config {given}: expected NAME: VALUE in each line, got {type(document).__name__}"
        )
    values = with_current_names({str(name).replace("-", "_"): document[name] for name in document})
    for name in values:
        if name not in options:
            raise InputError(f"--config {given}: {_unknown_option(name, options)}")
    return values
