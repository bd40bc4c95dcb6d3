"""The benchmark of copying: its problems, what counts, and a run on a tiny base."""

from pathlib import Path

import pytest
from support.benchmarks import measure, names_of
from support.tiny_bases import make_tiny_base

from carryon.tools.bench.accuracy import copying


def test_training_never_sees_the_problems_that_are_answered() -> None:
    unseen = copying._problems("marked", 60, seed=1)
    rows = list(copying._rows("marked", 200, unseen))
    train = {row["prompt"] for row in rows if row["split"] == "train"}
    assert len(train) == 200
    assert train.isdisjoint(prompt for prompt, _ in unseen)
    assert [row["prompt"] for row in rows if row["split"] == "held-out"] == [
        prompt for prompt, _ in unseen[:40]
    ]
    assert unseen[:10] == copying._problems("marked", 10, seed=1)


@pytest.mark.parametrize(
    ("ending", "text", "pair"),
    [
        ("marked", "40 + 80 = 120\n#### 106", ("120", "106")),
        ("marked", "40 + 80 = 120\n#### 120 apples", ("120", "120")),
        ("marked", "40 + 80 = 120", None),
        ("worded", "40 + 80 = 120\nTherefore, the final answer is 120.", ("120", "120")),
    ],
)
def test_the_computed_number_is_compared_with_the_last_line(
    ending: str, text: str, pair: tuple[str, str] | None
) -> None:
    match = copying._FORMS[ending].search(text)
    assert (match and match.groups()) == pair


def test_tap_sets_start_with_the_default_and_hold_the_embedding() -> None:
    sets = copying._tap_sets(30)
    assert sets[0] == ["final"]
    assert ["final", "layer.20", "layer.10", "layer.0"] in sets
    assert copying._tap_sets(2)[-1] == ["final", "layer.2", "layer.1", "layer.0"]


def test_a_run_reports_both_endings(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base")
    figures = measure("accuracy.copy", tmp_path, base=str(base))
    assert names_of(figures) == ["accuracy.copy.marked", "accuracy.copy.worded"]
    assert set(figures[0].details["sets"]) > {"final", "final+layer.0"}
    assert list(figures[1].details["sets"]) == ["final"]
