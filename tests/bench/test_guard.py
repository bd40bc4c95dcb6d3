"""The guard: ratios beside recorded ones."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest

from carryon.cache.errors import InputError
from carryon.tools.bench import guard as module
from carryon.tools.bench.guard import (
    HEADLINES,
    Headline,
    compare,
    guard,
    read_recorded,
    report_lines,
)
from carryon.tools.bench.registry import BENCHMARKS
from carryon.tools.bench.run import _function_of
from carryon.tools.compare.figure import Figure


def figure(value: float, sense: str = "at least") -> Figure:
    return Figure(figure="f", value=value, unit="x", sense=sense)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "sense", "recorded", "part", "fell"),
    [
        (0.89, "at least", 1.0, 0.89, True),
        (0.91, "at least", 1.0, 0.91, False),
        (2.0, "at least", 1.0, 2.0, False),
        (1.2, "at most", 1.0, 1 / 1.2, True),  # less is better
        (0.5, "at most", 1.0, 2.0, False),
        (0.0, "at least", 1.0, 0.0, True),
    ],
)
def test_a_fall_is_a_loss_of_more_than_a_tenth(
    value: float, sense: str, recorded: float, part: float, fell: bool
) -> None:
    found = compare(figure(value, sense), {"f": recorded})
    assert found.details == {"recorded": recorded, "of_recorded": pytest.approx(part), "fell": fell}


def test_a_figure_without_a_record_has_not_fallen() -> None:
    found = compare(figure(0.1), {"g": 1.0})
    assert found.details == {"recorded": None, "of_recorded": None, "fell": False}


def test_ratios_without_a_record_are_named_and_not_counted() -> None:
    known = {"f": 1.0}
    figures = [
        compare(replace(figure(1.0), figure=name, unit=unit), known)
        for name, unit in (("f", "x"), ("new", "x"), ("guard.seconds", "s"))
    ]
    assert report_lines(figures, kind="core", is_known=True) == [
        "core: none of 1 recorded ratios fell by more than 10%",
        "not recorded yet: new; --record keeps them",
    ]


def test_ten_ratios_of_benchmarks_that_take_these_sizes() -> None:
    assert sum(len(headline.figures) for headline in HEADLINES) == 10
    for headline in HEADLINES:
        known = inspect.signature(_function_of(headline.benchmark)).parameters
        assert set(headline.sizes) <= set(known), headline.benchmark
        assert BENCHMARKS[headline.benchmark].needs in ("", "base")


@pytest.fixture
def one_headline(monkeypatch: pytest.MonkeyPatch) -> None:
    headline = Headline(
        benchmark="store.write", figures=("write.growth",), sizes={"late_unit": 12, "rounds": 2}
    )
    monkeypatch.setattr(module, "HEADLINES", (headline,))
    monkeypatch.setattr(module, "make_guard_base", lambda folder: folder)


@pytest.mark.usefixtures("one_headline")
def test_values_are_recorded_by_kind_of_core_and_falls_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "guard.json"
    other = {"another core": {"write.growth": 3.0}}
    path.write_text(json.dumps(other))
    caplog.set_level("INFO")
    first = guard(recorded=str(path), record=True)
    assert [each["figure"] for each in first] == ["write.growth", "guard.seconds"]
    assert "nothing recorded on this kind of core yet" in caplog.text
    document = json.loads(path.read_text())
    kind = module.kind_of_core()
    assert document == {**other, kind: {"write.growth": float(f"{first[0]['value']:.4g}")}}
    document[kind]["write.growth"] = first[0]["value"] / 100  # growth is better where it is less
    path.write_text(json.dumps(document))
    again = guard(recorded=str(path))
    assert again[0]["fell"]
    assert "write.growth fell to" in caplog.text
    assert json.loads(path.read_text()) == document  # only --record writes


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', '{"a": {"b": "c"}}'])
def test_a_record_that_is_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "guard.json").write_text(text)
    with pytest.raises(InputError, match="expected figures by kind of core"):
        read_recorded(tmp_path / "guard.json")


def test_no_record_is_an_empty_one(tmp_path: Path) -> None:
    assert read_recorded(tmp_path / "guard.json") == {}
