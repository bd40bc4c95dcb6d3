"""The experiment of rounds: its figures, and a run with two seeds on a tiny base."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.easy_problems import write_easy_problems

from carryon.tools.bench.__main__ import main
from carryon.tools.bench.accuracy.rounds import Curve, figures_of, read_curve, table_of

CONFIG = """
data: [problems.jsonl]
rule: easy_rule:accept
keep_cut: true
train_config: tiny.yaml
"""
TINY_RUN = """
width: 8
heads: 2
blocks: 1
intermediate_size: 8
epochs: 1
tokens_per_step: 64
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "easy_rule", raising=False)  # of another test's folder
    write_easy_problems(tmp_path)
    (tmp_path / "improve.yaml").write_text(CONFIG)
    (tmp_path / "tiny.yaml").write_text(TINY_RUN)
    return tmp_path


def argv_of(base: Path, *more: str) -> list[str]:
    argv = ["experiment-improve", "--base", str(base), "--out", "out"]
    argv += ["--improve-config", "improve.yaml", "--rounds", "2", "--seeds", "0", "1"]
    argv += ["--num", "8", "--samples", "2", "--max-new-tokens", "6", "--test-num", "4"]
    return [*argv, "--device", "cpu", "--compute-dtype", "float32", *more]


def test_two_seeds_are_run_told_and_resumed(
    tiny_base_folder: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv_of(tiny_base_folder)) == 0
    output = capsys.readouterr()
    figures = [json.loads(line) for line in output.out.splitlines()]
    names = ["improve.rise", "improve.over_base", "improve.over_prompt"]
    assert [figure["figure"] for figure in figures] == names
    rounds = figures[0]["rounds"]
    assert figures[0]["value"] == pytest.approx(min(last - first for first, last in rounds))
    assert "--task-seed 10001" in output.err
    for seed in (0, 1):
        scores = [work / "out" / f"seed-{seed}" / f"round-{at}" / "score.json" for at in (1, 2)]
        results = [json.loads(path.read_text())["result"][0]["arms"][0] for path in scores]
        assert rounds[seed] == [each["accuracy"] for each in results]
    for name in ("table.md", "table.json", "accuracy.png"):
        assert (work / "out" / name).stat().st_size > 0

    trained = (work / "out/seed-1/round-2/run/result.json").stat().st_mtime_ns
    assert main(argv_of(tiny_base_folder)) == 0
    assert capsys.readouterr().out == output.out
    assert (work / "out/seed-1/round-2/run/result.json").stat().st_mtime_ns == trained

    (work / "tiny.yaml").write_text(TINY_RUN.replace("width: 8", "width: 16"))
    assert main(argv_of(tiny_base_folder)) == 2
    assert "tiny.yaml: expected the file that" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--rounds", "1"], "--rounds: expected 2 or more"),
        (["--seeds", "1", "1"], "--seeds: expected different ones"),
        (["--seeds", "0", "100"], "--seeds: expected different ones from 0 to 99"),
        (["--num", "6000"], "--num: expected 5000 or fewer for 2 rounds"),
    ],
)
def test_wrong_numbers_are_refused(
    tiny_base_folder: Path,
    work: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    assert main(argv_of(tiny_base_folder, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (work / "out").exists()


def row_of(number: int, accuracy: float, records: int = 0) -> dict[str, Any]:
    return {"round": number, "accuracy": accuracy, "records": records, "problems": 10}


def test_the_least_rise_of_the_seeds_counts() -> None:
    curves = [
        read_curve(0, [row_of(0, 0.2), row_of(0, 0.3), row_of(1, 0.4, 5), row_of(2, 0.5, 9)]),
        read_curve(1, [row_of(0, 0.2), row_of(0, 0.3), row_of(1, 0.5, 6), row_of(2, 0.4, 8)]),
    ]
    assert curves[0] == Curve(
        seed=0, base=0.2, instructed=0.3, rounds=[0.4, 0.5], records=[5, 9], problems=10
    )
    rise, over_base, over_prompt = figures_of(curves)
    assert (rise.value, rise.met) == (pytest.approx(-0.1), False)
    assert over_base.value == pytest.approx(0.2)
    assert over_prompt.value == pytest.approx(0.1)
    assert table_of(curves)[-1] == ["round 2", "50.0%, 40.0%", "45.0%", "9, 8"]

    [rise, _] = figures_of([read_curve(0, [row_of(0, 0.2), row_of(1, 0.3), row_of(2, 0.4)])])
    assert rise.met  # nobody was instructed
