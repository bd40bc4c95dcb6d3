"""Tables and figures of a comparison, from result files."""

from pathlib import Path
from typing import Any

import pytest

from carryon.cache.errors import InputError
from carryon.tools.bench.__main__ import BENCH
from carryon.tools.bench.paths_report import alpha_curve, figures_of, recommend


def _row(kind: str, seed: int, version: int, nll: float, **other: Any) -> dict[str, Any]:  # noqa: ANN401
    row = {"kind": kind, "schedule": "cosine", "alpha": 0.0, "seed": seed, "version": version}
    paid = {"steps": 10, "tokens": 100, "targets": 50, "train_s": 1.0}
    return {**row, "nll": nll, "nlls": [nll], **paid, **other}


def _results() -> list[dict[str, Any]]:
    lasts = {"scratch": [2.0, 2.25, 2.5], "restart": [2.5, 2.5, 2.5], "low": [2.75, 2.25, 3.0]}
    found = [
        _row(kind, seed, version, nll, steps=10 * version if kind == "scratch" else 10)
        for kind, nlls in lasts.items()
        for seed, nll in enumerate(nlls)
        for version in (1, 2)
    ]
    found += [
        _row("switch", seed, version, nll, alpha=0.6, steps=10 if version == 1 else 16)
        for seed, nll in enumerate([2.125, 2.25, 2.375])
        for version in (1, 2)
    ]
    return found


def test_differences_are_taken_seed_by_seed_and_judged_by_the_spread() -> None:
    found = {figure.figure: figure for figure in figures_of("here", _results())}

    scratch = found["paths.here.cosine.switch_minus_scratch"]
    assert (scratch.value, scratch.target, scratch.met) == (0.0, 0.5, True)
    assert scratch.details["differences"] == [0.125, 0.0, -0.125]
    continual = found["paths.here.cosine.switch_minus_better_continual"]
    assert continual.details["differences"] == [-0.375, 0.0, -0.125]
    assert found["paths.here.cosine.steps_of_switch"].value == pytest.approx(26 / 30)


def test_a_draw_with_the_better_continual_one_is_no_win() -> None:
    found = {figure.figure: figure for figure in figures_of("here", _results())}

    wins = found["paths.here.cosine.switch_below_better_continual"]
    assert (wins.value, wins.target, wins.met) == (2, 3, False)


def test_an_unfinished_seed_is_left_out() -> None:
    results = [
        row for row in _results() if (row["kind"], row["seed"], row["version"]) != ("switch", 1, 2)
    ]

    found = {figure.figure: figure for figure in figures_of("here", results)}

    assert found["paths.here.cosine.switch_minus_scratch"].details["differences"] == [0.125, -0.125]


def test_the_smallest_alpha_that_brings_most_of_the_gain_is_recommended() -> None:
    assert recommend({0.0: 3.0, 0.2: 2.5, 0.4: 2.04, 0.6: 2.03, 1.0: 2.0}) == 0.4
    assert recommend({0.0: 1.0, 0.2: 1.5, 0.6: 1.2}) == 0.0


def test_the_curve_is_over_the_seeds_that_have_every_alpha() -> None:
    results = [_row("trunk", seed, 2, 3.0, schedule="constant") for seed in (0, 1)]
    results += [_row("trunk", seed, 1, 3.0, schedule="constant") for seed in (0, 1)]
    for alpha, nlls in {0.2: [2.5, 9.0], 0.6: [2.25]}.items():
        results += [
            _row("switch", seed, version, nll, alpha=alpha)
            for seed, nll in enumerate(nlls)
            for version in (1, 2)
        ]

    assert alpha_curve(results, "cosine") == {0.0: 3.0, 0.2: 2.5, 0.6: 2.25}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--paradigms", "restarts"], "paradigms: expected some of scratch"),
        (["--schedules", "wsd"], "schedules: expected some of cosine, knee, multistep, got wsd"),
        ([], "stores: expected two increments or more, got 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        BENCH.call("experiment-paths", ["--stores", "a", "--out", str(tmp_path / "out"), *words])
