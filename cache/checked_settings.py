"""Settings dataclasses, with bounds declared on their fields and checked when one is made.

Example:
    epochs: int = bounded(3, at_least=1)
    taps: list[str] = bounded(["final"], min_items=1, is_unique=True)
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from types import MappingProxyType, NoneType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from carryon.cache.errors import InputError

T = TypeVar("T")
_INFINITE = (float("inf"), float("-inf"))
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Range of a setting; of a list, the range of each item."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: Collection[str] = ()
    """Names of which items are taken. Empty: any."""
    min_items: int = 0
    is_unique: bool = False
    """Whether a list may hold an item only once."""

    def problem(self, value: Any) -> str:  # noqa: ANN401
        """Return what is wrong with a value; empty if nothing is."""
        items = value if isinstance(value, list) else [value]
        got = " ".join(map(str, items)) or "none"
        if len(items) < self.min_items:
            return f"expected at least {self.min_items}, got {got}"
        if self.is_unique and len(set(items)) < len(items):
            return f"expected each once, got {got}"
        if self.choices and not set(items) <= set(self.choices):
            return f"expected some of {' '.join(self.choices)}, got {got}"
        if all(map(self._is_within, items)):
            return ""
        if any(item in _INFINITE for item in items):
            return f"expected a finite number, got {got}"
        return f"expected {self._range()}{' for each' * isinstance(value, list)}, got {got}"

    def _is_within(self, item: Any) -> bool:  # noqa: ANN401
        return (  # false for a NaN
            item not in _INFINITE
            and (self.at_least is None or item >= self.at_least)
            and (self.above is None or item > self.above)
            and (self.at_most is None or item <= self.at_most)
            and (self.below is None or item < self.below)
        )

    def _range(self) -> str:
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least} to {self.at_most}"
        texts = {
            f"{self.at_least} or more": self.at_least,
            f"more than {self.above}": self.above,
            f"at most {self.at_most}": self.at_most,
            f"below {self.below}": self.below,
        }
        return " and ".join(text for text, bound in texts.items() if bound is not None)


def bounded(default: T, **bounds: Any) -> T:  # noqa: ANN401
    """Return a dataclass field with this default and these `Bounds`."""
    metadata = {"bounds": Bounds(**bounds)}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)  # type: ignore[return-value]
    return field(default=default, metadata=metadata)


class Settings:
    """Base of frozen dataclasses whose fields are settings."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Check every field, then what `problems` compares.

        Raises:
            InputError: names every wrong field.
        """
        wrong = list(_wrong_fields(self))
        wrong = wrong or [text for is_wrong, text in self.problems() if is_wrong]
        if wrong:
            raise InputError("; ".join(wrong))

    def problems(self) -> list[tuple[bool, str]]:
        """Return (is it wrong, error text) of what fields, each within its bounds, may not be
        together."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # of a dataclass

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values.

        Raises:
            InputError: a key is not a field, or a value is of another type or out of range.
        """
        known = {item.name for item in fields(cls)}  # type: ignore[arg-type]  # of a dataclass
        if unknown := sorted(set(values) - known):
            raise InputError(f"{cls.__name__}: unknown setting {', '.join(unknown)}")
        types = get_type_hints(cls)
        for name, value in values.items():
            if not _is_of(value, types[name]):
                raise InputError(f"{name}: expected {_type_name(types[name])}, got {value!r:.80}")
        return cls(**values)


def _is_of(value: Any, kind: Any) -> bool:  # noqa: ANN401
    """Return whether a plain value is of a field's type; a whole number is also a number."""
    inner = get_args(kind)
    if get_origin(kind) in (list, tuple):
        return isinstance(value, list | tuple) and all(_is_of(item, inner[0]) for item in value)
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) for choice in inner)
    if NoneType in inner:
        return value is None or _is_of(value, inner[0])
    return type(value) is kind or (kind is float and type(value) is int)


def _type_name(kind: Any) -> str:  # noqa: ANN401
    if get_origin(kind) in (list, tuple):
        return "a list"
    return _TYPE_NAMES.get(kind) or _listed(choices_of(kind) or [str(kind)])


def apply_options(
    options: Mapping[str, Any],
    *parts: Settings,
    other_names: Mapping[str, str] = MappingProxyType({}),
) -> list[Any]:
    """Return the settings `parts` with the fields that `options` names changed.

    Args:
        options: values by field name; texts are parsed.
        parts: settings of any classes.
        other_names: names that fields have elsewhere -> names here, to suggest.

    Raises:
        InputError: a name is unknown, or a value is of another type or out of range.
    """
    parsed = parse_options(options, *map(type, parts), other_names=other_names)
    names = [{item.name for item in fields(part)} for part in parts]  # type: ignore[arg-type]
    return [
        replace(part, **{name: parsed[name] for name in own & set(parsed)})  # type: ignore[type-var]
        for part, own in zip(parts, names, strict=True)
    ]


def choices_of(kind: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return how each value of a Literal or a bool is written; of another type none."""
    if kind is bool:
        return {"true": True, "yes": True, "false": False, "no": False}
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return {
        str(choice).lower() if isinstance(choice, bool) else str(choice): choice
        for choice in choices
    }


def _listed(choices: Iterable[str]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}" if others else last


def parse_value(name: str, value: Any, kind: Any) -> Any:  # noqa: ANN401
    """Return a value in the type `kind`; texts are parsed, as YAML reads 1e-3 as a text.

    Raises:
        InputError: it is not of this type; the text begins with `name`.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{name}: expected a list, got {value!r}")
        return origin(parse_value(name, item, inner[0]) for item in value)
    if NoneType in inner:
        return None if value is None else parse_value(name, value, inner[0])
    expected = _TYPE_NAMES.get(kind) or _listed(choices_of(kind))
    if value is None or isinstance(value, (list, tuple, dict)):
        raise InputError(f"{name}: expected {expected}, got {value!r}")
    try:
        if choices := choices_of(kind):
            is_bool = kind is bool or isinstance(value, bool)
            return choices[str(value).lower() if is_bool else str(value)]
        return kind(str(value))
    except (KeyError, ValueError) as error:
        raise InputError(f"{name}: expected {expected}, got {value!r}") from error


def parse_options(
    options: Mapping[str, Any],
    *classes: type[Settings],
    other_names: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Return options in the types of their fields; a single item stands for a list of one.

    Arguments and errors are those of `apply_options`.
    """
    types = {name: kind for cls in classes for name, kind in get_type_hints(cls).items()}
    parsed: dict[str, Any] = {}
    for name, value in options.items():
        if name not in types:
            near = [*get_close_matches(name, types, n=1), *(n for n in types if name in n)]
            near = [other_names[name]] if name in other_names else near
            hint = f"did you mean {near[0]}?" if near else f"none of {len(types)} is similar"
            raise InputError(f"no setting {name}: {hint}")
        is_item = get_origin(types[name]) is list and not isinstance(value, (list, tuple))
        parsed[name] = parse_value(name, [value] if is_item else value, types[name])
    return parsed


def _wrong_fields(settings: Settings) -> Iterator[str]:
    items: tuple[Field[Any], ...] = fields(settings)  # type: ignore[arg-type]  # of a dataclass
    for item in items:
        value, choices = getattr(settings, item.name), get_args(item.type)
        if get_origin(item.type) is Literal and value not in choices:
            yield f"{item.name}: expected {_listed(choices_of(item.type))}, got {value}"
        if problem := item.metadata.get("bounds", Bounds()).problem(value):
            yield f"{item.name}: {problem}"
