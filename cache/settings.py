"""Settings: what all their dataclasses share, to plain values and back, checked as a whole."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any, Literal, Self, get_args, get_origin

from carryon.cache.errors import InputError


class Settings:
    """Base of frozen dataclasses whose fields are settings.

    Every wrong field is named in one error: those of a `Literal` type that have none of its
    values, and what `problems` says.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        """Raise InputError naming every field that is out of range."""
        found = [*_wrong_choices(self), *(text for wrong, text in self.problems() if wrong)]
        if found:
            raise InputError("; ".join(found))

    def problems(self) -> list[tuple[bool, str]]:
        """Return (is it wrong, what to say then) for what a type alone does not tell."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # of a dataclass

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from plain values.

        Raises:
            InputError: a key is not a field, or a value is out of range.
        """
        known = {item.name for item in fields(cls)}  # type: ignore[arg-type]  # of a dataclass
        if unknown := sorted(set(values) - known):
            raise InputError(f"{cls.__name__}: unknown setting {', '.join(unknown)}")
        return cls(**values)


def not_a_share(name: str, value: float) -> tuple[bool, str]:
    """Return the problem of a value that is not from 0 to 1."""
    return not 0 <= value <= 1, f"{name}: expected 0 to 1, got {value}"


def not_below_one(name: str, value: float) -> tuple[bool, str]:
    """Return the problem of a value that is not from 0 to below 1."""
    return not 0 <= value < 1, f"{name}: expected 0 or more and below 1, got {value}"


def not_positive(values: Mapping[str, Any]) -> tuple[bool, str]:
    """Return the problem of numbers, or lists of them, that are not above 0."""
    wrong = []
    for name, value in values.items():
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not min(numbers) > 0:
            wrong.append(name)
    return bool(wrong), f"{', '.join(wrong)}: expected more than 0"


def unknown_names(field: str, given: list[str], known: Collection[str]) -> tuple[bool, str]:
    """Return the problem of names that are not among the known ones."""
    wrong = [name for name in given if name not in known]
    return bool(wrong), f"{field}: expected some of {' '.join(known)}, got {' '.join(wrong)}"


def _wrong_choices(settings: Settings) -> Iterator[str]:
    for item in fields(settings):  # type: ignore[arg-type]  # of a dataclass
        value, choices = getattr(settings, item.name), get_args(item.type)
        if get_origin(item.type) is Literal and value not in choices:
            *others, last = map(str, choices)
            yield f"{item.name}: expected {', '.join(others)} or {last}, got {value}"
