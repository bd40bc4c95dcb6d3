"""The options of a typed function, read from its signature and its docstrings.

A command is a function whose parameters are plain values or settings dataclasses:

- a positional-only parameter is a positional argument, any other an option of its name;
- a settings dataclass contributes each field as an option, dataclasses within it likewise;
- help texts are the `Args:` of the function and the docstrings under the fields.
"""

import ast
import inspect
import re
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

REQUIRED = inspect.Parameter.empty
"""Default of an option that must be given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """A command-line option, or a positional argument."""

    name: str
    """As in the code and in config files: with underscores."""
    kind: Any
    """Type annotation."""
    default: Any
    """Value when not given, or REQUIRED."""
    help: str
    """One paragraph: meaning, unit, special values."""
    heading: str
    """First line of the dataclass's docstring; empty for a parameter of the function."""
    is_positional: bool = False

    @property
    def flag(self) -> str:
        """The name as typed on the command line."""
        return self.name if self.is_positional else "--" + self.name.replace("_", "-")

    @property
    def is_list(self) -> bool:
        """Whether it takes several values."""
        return typing.get_origin(self.kind) in (list, tuple)

    @property
    def item_kind(self) -> Any:  # noqa: ANN401
        """Type of one value that is given."""
        inner = typing.get_args(self.kind)
        return inner[0] if self.is_list or NoneType in inner else self.kind


def options_of(target: Callable[..., Any]) -> list[Option]:
    """Return the options of a function or a settings dataclass, in order."""
    about = inspect.getdoc(target) or ""
    texts = _field_texts(target) if is_settings(target) else _argument_texts(about)
    factories = {
        name: item.default_factory
        for name, item in getattr(target, "__dataclass_fields__", {}).items()
        if item.default_factory is not MISSING
    }
    kinds = typing.get_type_hints(target)
    options: list[Option] = []
    for name, parameter in inspect.signature(target).parameters.items():
        if is_settings(kinds[name]):
            options += options_of(kinds[name])
            continue
        option = Option(
            name=name,
            kind=kinds[name],
            default=factories[name]() if name in factories else parameter.default,
            help=texts.get(name, ""),
            heading=about.partition("\n")[0].rstrip(".") if is_settings(target) else "",
            is_positional=parameter.kind is parameter.POSITIONAL_ONLY,
        )
        options.append(option)
    return options


def is_settings(kind: object) -> bool:
    """Return whether a type annotation is a settings dataclass."""
    return isinstance(kind, type) and is_dataclass(kind)


def _argument_texts(docstring: str) -> dict[str, str]:
    """Return the text of each argument in a Google-style docstring."""
    section = docstring.partition("\nArgs:\n")[2].partition("\n\n")[0]
    items = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in items}


def _field_texts(cls: Any) -> dict[str, str]:  # noqa: ANN401
    """Return the docstring under each field of a class, which only its source has."""
    tree = _parse(inspect.getfile(cls))
    [body] = [
        x.body for x in ast.walk(tree) if isinstance(x, ast.ClassDef) and x.name == cls.__name__
    ]
    texts = {}
    for field, below in zip(body, body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=text)):
                texts[name] = " ".join(str(text).split())
    return texts


@cache
def _parse(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text(encoding="utf-8"))
