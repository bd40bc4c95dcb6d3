"""Settings: what all their dataclasses share, to plain values and back, checked as a whole."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
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


def not_a_ratio(name: str, value: float) -> tuple[bool, str]:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSettings(Settings):
    """How text becomes samples."""

    mask: Literal["auto", "assistant", "completion", "all"] = "auto"
    """Which tokens are training targets: `assistant` turns of `messages`, the `completion` of
    `prompt` + `completion`, or `all` tokens. `auto` takes what fits each record: assistant turns,
    completions, and everything of a plain `text`."""
    max_tokens: int = 0
    """Longest sample, in tokens. 0: the base's context or the unit, whichever is smaller."""
    long: Literal["truncate", "split", "skip", "error"] = "truncate"
    """What becomes of a longer sample: cut off, split into pieces, left out, or an error.
    Counted and recorded."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return [
            (self.max_tokens < 0, f"max_tokens: expected 0 or more tokens, got {self.max_tokens}")
        ]


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreSettings(Settings):
    """What the store holds, and how it is cut."""

    taps: list[str] = field(default_factory=lambda: ["final"])
    """Hidden states to keep: `final` (what the head reads), `prenorm` (before the base's last
    norm), `layer.K` (after block K, counted from 1). Several in one pass are allowed."""
    profile: Literal["exact", "near", "compact"] = "exact"
    """`exact` keeps every bit; `near` and `compact` are smaller and record their error."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the stored states; `near` and `compact` read back as this type."""
    unit_tokens: int = 32768
    """Tokens in a unit, the piece of work that is written, checked, resumed and read as one."""
    seed: int = 0
    """Seed of the shuffle of samples into units."""
    with_blocks: int = 0
    """The base's last blocks to keep beside the head, from which carry-ons of the kinds `native`
    and `top` are trained without the base. 0: none."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return [
            (not self.taps, "taps: expected at least one tap, got none"),
            (
                len(set(self.taps)) != len(self.taps),
                f"taps: expected each tap once, got {' '.join(self.taps)}",
            ),
            (
                self.unit_tokens < 16,
                f"unit_tokens: expected 16 or more tokens, got {self.unit_tokens}",
            ),
            (self.seed < 0, f"seed: expected 0 or more, got {self.seed}"),
            (
                self.with_blocks < 0,
                f"with_blocks: expected 0 or more blocks, got {self.with_blocks}",
            ),
            (
                self.profile != "exact" and self.dtype != "bfloat16",
                f"profile {self.profile} reads back as bfloat16, got dtype {self.dtype}: "
                "drop dtype or use the profile exact",
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        values = Settings.to_dict(self)
        if not self.with_blocks:
            del values["with_blocks"]  # as in stores from before there were any
        return values


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardSettings(Settings):
    """How the frozen base is run."""

    device: str = "auto"
    """`auto` (an accelerator where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type the base computes in. `auto`: bfloat16 where the device multiplies it natively,
    float32 on a CPU that does not."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention backend of transformers."""
    batch_tokens: int = 4096
    """Tokens in one forward pass, pads included; one longer sample still makes a batch."""

    def problems(self) -> list[tuple[bool, str]]:
        """Return what is out of range."""
        return [
            (self.batch_tokens < 1, f"batch_tokens: expected 1 or more, got {self.batch_tokens}")
        ]


def parse_tap(name: str, *, num_layers: int) -> int | None:
    """Return K of `layer.K`, or None for `final` and `prenorm`.

    Raises:
        InputError: no such tap in a base of `num_layers` blocks.
    """
    if name in ("final", "prenorm"):
        return None
    kind, _, number = name.partition(".")
    if kind == "layer" and number.isdecimal() and 1 <= int(number) <= num_layers:
        return int(number)
    raise InputError(
        f"tap {name!r}: this base has final, prenorm and layer.1 to layer.{num_layers}"
    )
