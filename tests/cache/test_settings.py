"""Bounds of settings: what is refused, and the error text."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from carryon.cache.checked_settings import Settings, bounded, parse_value
from carryon.cache.errors import InputError
from carryon.cache.settings import CorpusSettings, ForwardSettings, StoreSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Cake(Settings):
    layers: int = bounded(3, at_least=1)
    sugar: float = bounded(0.5, at_least=0, at_most=1)
    salt: float = bounded(0.0, at_least=0, below=1)
    height: float = bounded(1.0, above=0, below=10)
    slices: list[int] = bounded([8], above=0)
    guests: list[str] = bounded(["ann"], min_items=1, is_unique=True, choices=("ann", "bob"))
    icing: Literal["none", "lemon"] = "none"
    is_cut: Literal["auto", True, False] = "auto"

    def problems(self) -> list[tuple[bool, str]]:
        return [(self.sugar * self.layers > 2, "sugar: expected 2 at most over all layers")]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"layers": 0}, "layers: expected 1 or more, got 0"),
        ({"sugar": 1.5}, "sugar: expected 0 to 1, got 1.5"),
        ({"sugar": float("nan")}, "sugar: expected 0 to 1, got nan"),
        ({"salt": 1.0}, "salt: expected 0 or more and below 1, got 1.0"),
        ({"height": 0.0}, "height: expected more than 0 and below 10, got 0.0"),
        ({"slices": [3, 0]}, "slices: expected more than 0 for each, got 3 0"),
        ({"guests": []}, "guests: expected at least 1, got none"),
        ({"guests": ["ann", "ann"]}, "guests: expected each once, got ann ann"),
        ({"guests": ["cat"]}, "guests: expected some of ann bob, got cat"),
        ({"icing": "lime"}, "icing: expected none or lemon, got lime"),
        ({"is_cut": "yes"}, "is_cut: expected auto, true or false, got yes"),
        ({"sugar": 1.0}, "sugar: expected 2 at most over all layers"),
        (
            {"layers": 0, "salt": -1.0},
            "layers: expected 1 or more, got 0; salt: expected 0 or more and below 1, got -1.0",
        ),
    ],
    ids=str,
)
def test_a_wrong_setting_is_refused_with_its_name_and_bounds(
    values: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError) as error:
        Cake(**values)
    assert str(error.value) == text


def test_a_choice_may_be_a_truth_value() -> None:
    kind = Literal["auto", True, False]
    for value in ("auto", True, False):
        assert parse_value("--is-cut", value, kind) is value
        assert parse_value("--is-cut", str(value).lower(), kind) is value
    with pytest.raises(InputError, match=r"--is-cut: expected auto, true or false, got 'no'"):
        parse_value("--is-cut", "no", kind)


def test_settings_within_their_bounds_are_taken() -> None:
    cake = Cake(layers=1, sugar=1, salt=0, height=9.9, slices=[], guests=["bob", "ann"])
    assert Cake.from_dict(cake.to_dict()) == cake
    assert Cake().slices is not Cake().slices
    with pytest.raises(InputError, match="Cake: unknown setting colour"):
        Cake.from_dict({"colour": "red"})


@pytest.mark.parametrize(
    ("cls", "values", "text"),
    [
        (CorpusSettings, {"max_tokens": -1}, "max_tokens: expected 0 or more, got -1"),
        (StoreSettings, {"unit_tokens": 8}, "unit_tokens: expected 16 or more, got 8"),
        (StoreSettings, {"taps": []}, "taps: expected at least 1, got none"),
        (StoreSettings, {"profile": "near", "dtype": "float32"}, "dtype: expected bfloat16 for"),
        (ForwardSettings, {"batch_tokens": 0}, "batch_tokens: expected 1 or more, got 0"),
    ],
    ids=str,
)
def test_settings_of_an_extraction_have_bounds(
    cls: type[Settings], values: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=text):
        cls(**values)
