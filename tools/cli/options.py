"""The options of a typed function: what its signature and docstrings say about each.

A subcommand is a function whose parameters are plain values or settings dataclasses:

- a positional-only parameter is a positional argument, any other an option of its name;
- a settings dataclass contributes each of its fields as an option, under a heading;
- help texts come from the function's docstring and from the docstrings under the fields.

Pure; how options are written on a command line is `command_line.py`.
"""

import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

import docstring_parser

REQUIRED = object()
"""Default of an option that has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One command-line option, or one positional argument."""

    name: str
    """As in the code and in config files: with underscores."""
    kind: Any
    """Type annotation."""
    default: Any
    """Value when not given, or REQUIRED."""
    help: str
    """One paragraph: meaning, unit, special values."""
    heading: str | None
    """Headline of its group in the help; None: before all groups."""
    is_positional: bool

    @property
    def flag(self) -> str:
        """The option as it is written on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return typing.get_origin(self.kind) in (list, tuple)


def options_of(function: Callable[..., Any]) -> list[Option]:
    """Return the options of `function`, those of a dataclass parameter in its place."""
    documented = docstring_parser.parse(function.__doc__ or "").params
    texts = {item.arg_name: item.description or "" for item in documented}
    kinds = typing.get_type_hints(function)
    options: list[Option] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if is_settings(kinds[name]):
            options += _options_of_dataclass(kinds[name])
            continue
        has_default = parameter.default is not parameter.empty
        options.append(
            Option(
                name=name,
                kind=kinds[name],
                default=parameter.default if has_default else REQUIRED,
                help=texts.get(name, ""),
                heading=None,
                is_positional=parameter.kind is parameter.POSITIONAL_ONLY,
            )
        )
    return options


def is_settings(kind: object) -> bool:
    """Whether a type annotation is a settings dataclass."""
    return isinstance(kind, type) and is_dataclass(kind)


def _options_of_dataclass(cls: type) -> list[Option]:
    parsed = docstring_parser.parse_from_object(cls)
    texts = {item.arg_name: item.description or "" for item in parsed.params}
    kinds = typing.get_type_hints(cls)
    options = []
    for item in fields(cls):
        default = REQUIRED if item.default is MISSING else item.default
        if item.default_factory is not MISSING:
            default = item.default_factory()
        options.append(
            Option(
                name=item.name,
                kind=kinds[item.name],
                default=default,
                help=texts.get(item.name, ""),
                heading=(parsed.short_description or cls.__name__).rstrip("."),
                is_positional=False,
            )
        )
    return options
