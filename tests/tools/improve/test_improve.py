"""`carryon improve` on a tiny base: two rounds, resume at every step, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from carryon.cache.errors import NothingRightError
from carryon.cache.format.manifest import read_manifest
from carryon.cache.store.reader import Store
from carryon.tools.cli.main import main
from carryon.tools.improve import steps
from carryon.tools.improve.report import Row, format_rows, plot_rounds, read_scores

TINY_RUN = """
width: 8
heads: 2
blocks: 1
intermediate_size: 8
epochs: 1
tokens_per_step: 64
"""


def improve_argv(base: Path, out: str = "out", *more: str) -> list[str]:
    argv = ["improve", "--base", str(base), "--data", "problems.jsonl", "--out", out]
    argv += ["--rule", "easy_rule:accept", "--rounds", "2", "--samples", "2", "--test-num", "4"]
    argv += ["--max-new-tokens", "6", "--keep-cut", "--train-config", "tiny.yaml"]
    return [*argv, "--device", "cpu", "--compute-dtype", "float32", *more]


@pytest.fixture
def work(easy: Path) -> Path:
    """The working directory, with settings of a tiny run."""
    (easy / "tiny.yaml").write_text(TINY_RUN)
    return easy


def last_line(text: str) -> Any:  # noqa: ANN401
    return json.loads(text.splitlines()[-1])


def test_two_rounds_and_then_a_third(
    tiny_base_folder: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(improve_argv(tiny_base_folder)) == 0
    output = capsys.readouterr()
    rounds = last_line(output.out)["rounds"]
    assert [(each["name"], each["round"]) for each in rounds] == [
        ("base", 0),
        ("base, instruct:Think step by step.", 0),
        ("1", 1),
        ("2", 2),
    ]
    assert all(each["problems"] == 4 for each in rounds)
    assert all(0 <= each["low"] <= each["accuracy"] <= each["high"] <= 1 for each in rounds)
    assert rounds[3]["records"] > rounds[2]["records"] > 0
    assert set(rounds[3]["seconds"]) == {"sample", "extract", "train", "score"}
    assert Store.open(work / "out" / "store").num_samples == rounds[3]["records"]
    assert len(read_manifest(work / "out" / "store").parts) == 2
    for command in ("carryon sample --base", "carryon extract --base", "carryon train --store"):
        assert f"$ {command}" in output.err
    assert "--append" in output.err
    assert output.err.rstrip().splitlines()[-1].startswith("2 ")
    assert len(output.out.splitlines()) == 1
    posed = {
        json.loads(line)["sampled"]["question"]
        for path in (work / "out").glob("round-*/*.jsonl")
        if path.name != "answers.jsonl"
        for line in path.read_text().splitlines()
    }
    tested = [
        json.loads(line)["question"]
        for line in (work / "out" / "round-1" / "answers.jsonl").read_text().splitlines()[1:]
    ]
    assert len(tested) == 4
    assert posed.isdisjoint(tested)
    if (work / "out" / "accuracy.png").exists():
        assert last_line(output.out)["plot"] == "out/accuracy.png"

    assert main(improve_argv(tiny_base_folder, "out", "--rounds", "3")) == 0
    output = capsys.readouterr()
    more = last_line(output.out)["rounds"]
    assert more[:4] == rounds
    assert output.err.count("done before") == 2 + 8
    assert main(improve_argv(tiny_base_folder, "out", "--samples", "3")) == 2
    assert "--samples: expected 2 as in out/improve.json, got 3" in capsys.readouterr().err


def test_a_run_stopped_behind_any_command_resumes(
    tiny_base_folder: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call, calls = steps.call_command, list[str]()

    def stop_behind(name: str, argv: Any) -> Any:  # noqa: ANN401
        result = call(name, argv)
        calls.append(name)
        if len(calls) % 2:
            raise KeyboardInterrupt  # before the result is kept
        return result

    monkeypatch.setattr(steps, "call_command", stop_behind)
    codes = [main(improve_argv(tiny_base_folder)) for _ in range(12)]
    while codes[-1] == 0:
        codes.pop()
    assert set(codes) == {130}
    assert len(codes) >= 8
    monkeypatch.setattr(steps, "call_command", call)
    assert main(improve_argv(tiny_base_folder)) == 0
    stopped = last_line(capsys.readouterr().out)["rounds"]
    assert main(improve_argv(tiny_base_folder, "other")) == 0
    whole = last_line(capsys.readouterr().out)["rounds"]
    for each in [*stopped, *whole]:
        del each["seconds"]
    assert stopped == whole


def test_nothing_right_at_all_is_one_line(
    tiny_base_folder: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(improve_argv(tiny_base_folder, "out", "--rule", "easy_rule:refuse")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "answers were cut at the limit and none is right" in error


def test_a_round_without_new_answers_is_the_last(
    tiny_base_folder: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call = steps.call_command

    def find_once(name: str, argv: Any) -> Any:  # noqa: ANN401
        if name == "sample" and "--known" in argv:
            raise NothingRightError("all 8 right answers of 9 are in --known")
        return call(name, argv)

    monkeypatch.setattr(steps, "call_command", find_once)
    assert main(improve_argv(tiny_base_folder)) == 0
    output = capsys.readouterr()
    assert [each["name"] for each in last_line(output.out)["rounds"]][2:] == ["1"]
    assert "warning: all 8 right answers of 9 are in --known" in output.err
    assert "round 2 found no new right answer: stopped" in output.err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--rounds", "0"], "--rounds: expected 1 or more"),
        (["--tasks", "chain_sum", "--task-seed", "1000000"], "--test-seed: expected one far"),
        (["--test-num", "16"], "got 16 that all are"),
    ],
)
def test_wrong_input_is_one_line(
    more: list[str],
    told: str,
    tiny_base_folder: Path,
    work: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(improve_argv(tiny_base_folder, "out", *more)) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_foreign_folder_is_refused(
    tiny_base_folder: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "out").mkdir()
    (work / "out" / "thesis.tex").touch()
    assert main(improve_argv(tiny_base_folder)) == 2
    assert "with thesis.tex. Fix: give another --out" in capsys.readouterr().err


def test_scores_of_several_tasks_are_added_up() -> None:
    documents = [
        {"arms": [{"arm": "carryon", "problems": 10, "right": 5}]},
        {"arms": [{"arm": "carryon", "problems": 30, "right": 5}]},
    ]
    score = read_scores(documents)["carryon"]
    assert (score["problems"], score["right"], score["accuracy"]) == (40, 10, 0.25)
    assert score["low"] < 0.25 < score["high"]


def test_table_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        Row(name=name, round=number, records=9, problems=4, right=2, accuracy=0.5, low=0, high=1)
        for number, name in enumerate(["base", "1", "2"])
    ]
    assert format_rows(rows).splitlines()[1].split()[:3] == ["base", "9", "-"]
    assert plot_rounds(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
