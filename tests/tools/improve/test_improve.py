"""`carryon improve` on a tiny base: two rounds, resume at every step, refusals."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from carryon.cache.errors import DamagedFileError, InputError, NothingRightError
from carryon.cache.format.manifest import read_manifest
from carryon.cache.store.reader import Store
from carryon.tools.cli.main import main
from carryon.tools.improve import steps
from carryon.tools.improve.plan import Plan
from carryon.tools.improve.report import Row, format_rows, plot_rounds, read_scores
from carryon.train.settings_file import check_settings

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


def test_without_settings_three_taps_are_kept_and_trained_on_in_many_small_steps(
    tiny_base_folder: Path, work: Path
) -> None:
    argv = improve_argv(tiny_base_folder, "out", "--rounds", "1")
    at = argv.index("--train-config")
    assert main(argv[:at] + argv[at + 2 :]) == 0

    assert list(Store.open("out/store").taps) == ["final", "layer.2", "layer.1"]
    settings = check_settings(Path("out/round-1/run/config.yaml"))
    assert settings["taps"] == ["final", "layer.2", "layer.1"]
    assert (settings["epochs"], settings["tokens_per_step"]) == (6, 384)


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
    assert "--max-samples 32 --form-ratio 0.5" in output.err
    assert "warning: --unsolved: expected a problem without an answer in --known" in output.err
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
    has_plot = (work / "out" / "accuracy.png").exists()
    assert has_plot == (find_spec("matplotlib") is not None)
    assert last_line(output.out)["plot"] == "out/accuracy.png" * has_plot

    assert main(improve_argv(tiny_base_folder, "out", "--rounds", "3")) == 0
    output = capsys.readouterr()
    more = last_line(output.out)["rounds"]
    assert more[:4] == rounds
    assert output.err.count("done before") == 1 + 4 + 5
    assert main(improve_argv(tiny_base_folder, "out", "--samples", "3")) == 2
    assert "--samples: expected 2 as in out/improve.json, got 3" in capsys.readouterr().err

    for name in ("tiny.yaml", "problems.jsonl", "easy_rule.py"):
        content = (work / name).read_bytes()
        (work / name).write_bytes(content + b"\n")
        assert main(improve_argv(tiny_base_folder)) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert name.partition(".")[0] in error
        assert "was made with, got a changed one. Fix: restore it, or give another --out" in error
        (work / name).write_bytes(content)
    (work / "out").rename(work / "moved")
    assert main(improve_argv(tiny_base_folder, str(work / "moved"))) == 0
    assert last_line(capsys.readouterr().out)["rounds"] == rounds


def test_from_round_two_on_the_base_is_told_what_no_round_has_found(
    tiny_base_folder: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hard = "def accept(text, problem):\n    return sum(map(ord, text)) % 3 == 0\n"
    (work / "easy_rule.py").write_text(hard)
    # Enough of them that on no core all or none of the told answers are right.
    rows = [
        {"id": f"q{at}", "question": f"{'the ' * (at % 4)}{at}", "answer": "x"} for at in range(60)
    ]
    (work / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = improve_argv(tiny_base_folder, "out", "--max-samples", "0", "--rounds", "3")
    argv += ["--samples", "1", "--temperature", "1.5"]
    assert main(argv) == 0
    output = capsys.readouterr()
    [first, second, third] = last_line(output.out)["rounds"][2:]
    assert not (work / "out" / "round-1" / "hinted.jsonl").exists()
    lines = (work / "out" / "round-2" / "hinted.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    results = [
        json.loads((work / "out" / f"round-{number}" / f"{name}.json").read_text())["result"]
        for number, name in (
            (1, "sample"),
            (2, "sample"),
            (2, "hinted"),
            (3, "sample"),
            (3, "hinted"),
        )
    ]
    kept = [result["kept"] if result else 0 for result in results]
    assert kept[2] == len(records) > 0
    assert first["records"] == kept[0]
    assert second["records"] == sum(kept[:3])
    assert third["records"] == sum(kept)
    assert Store.open(work / "out" / "store").num_samples == sum(kept)
    told = records[0]["sampled"]
    assert told["hint"] == "The answer is {answer}."
    assert 1 <= told["shots"] <= 8
    assert told["temperature"] == 0
    assert not any("The answer is" in each["messages"][0]["content"] for each in records)
    solved = {
        json.loads(line)["sampled"]["question"]
        for number in (1, 2)
        for line in (work / "out" / f"round-{number}" / "corpus.jsonl").read_text().splitlines()
    }
    assert solved.isdisjoint({each["sampled"]["question"] for each in records})


def test_of_tasks_the_base_is_told_what_earlier_rounds_left_too() -> None:
    plan = make_plan(tasks=["chain_sum"], data=[])
    asked = plan.hinted_argv(3, [plan.corpus(1), plan.hinted(2)])
    text = " ".join(asked)
    assert "--tasks chain_sum --num 30 --task-seed 5 --seed 3 --samples 1 --keep 1" in text
    assert "--temperature 0 --unsolved --hint it is {answer} --shots 8" in text
    assert "--examples out/round-1/corpus.jsonl" in text
    assert "--known out/round-1/corpus.jsonl out/round-2/hinted.jsonl" in text
    assert "--form-ratio" not in text
    text = " ".join(make_plan(tasks=["chain_sum"], data=["q.jsonl"]).hinted_argv(3, []))
    assert "--num 10 --task-seed 25" in text


def test_round_one_shows_what_the_instructed_base_has_solved() -> None:
    plan = make_plan(tasks=["chain_sum"], data=[], shots=3)
    asked = plan.examples_argv()
    assert asked[asked.index("--out") + 1] == str(plan.examples) == "out/round-1/examples.jsonl"
    text = " ".join(asked)
    assert "--num 10 --task-seed 5 --seed 1 --samples 4 --keep 1 --instruction think" in text
    assert "--test-num 7 --test-seed 1000" in text
    assert "--form-ratio 0.5" in text  # no lucky guess is an example
    text = " ".join(plan.sample_argv(1, []))
    assert f"--shots 3 --examples {plan.examples} --example-sets 8" in text
    assert f"--examples-out {plan.shown}" in text
    assert "--instruction" not in text
    text = " ".join(plan.sample_argv(2, []))
    assert "--shots" not in text
    assert f"--carryon {plan.carryon(1)}" in text
    text = " ".join(plan.hinted_argv(2, []))
    assert f"--shots 3 --examples {plan.shown}" in text
    for shots in (0, 3):
        plan = make_plan(tasks=["chain_sum"], data=[], shots=shots)
        assert ("--instruction think" in " ".join(plan.sample_argv(1, []))) == (not shots)


def test_rounds_behind_own_examples(
    tiny_base_folder: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = improve_argv(tiny_base_folder, "out", "--shots", "1", "--rounds", "2")
    assert main(argv) == 0
    output = capsys.readouterr()
    rounds = last_line(output.out)["rounds"]
    examples, shown, corpus = (
        [json.loads(line) for line in (work / "out" / "round-1" / name).read_text().splitlines()]
        for name in ("examples.jsonl", "shown.jsonl", "corpus.jsonl")
    )
    solved = [
        (each["messages"][-2]["content"], each["messages"][-1]["content"]) for each in examples
    ]
    assert len(shown) == 2
    assert {(each["question"], each["answer"]) for each in shown} <= set(solved)
    assert all(each["sampled"]["shots"] == 1 for each in corpus)
    assert not any(each["sampled"]["instruction"] for each in corpus)
    assert "think" not in {each["sampled"]["instruction"] for each in corpus}
    assert rounds[-1]["round"] == 2
    assert output.err.count("$ carryon sample") == 4  # examples; round 1; round 2, and told ones
    assert main(argv) == 0  # nothing runs again
    again = capsys.readouterr()
    assert last_line(again.out)["rounds"] == rounds
    assert again.err.count("done before") == output.err.count("$ carryon")
    assert main([*argv, "--shots", "2"]) == 2
    assert "--shots: expected 1 as in" in capsys.readouterr().err


def make_plan(*, tasks: list[str], data: list[str], shots: int = 0) -> Plan:
    return Plan(
        root=Path("out"),
        base="base",
        tasks=tasks,
        data=data,
        rule="auto",
        num=10,
        samples=4,
        max_samples=8,
        keep=2,
        instruction="think",
        shots=shots,
        hint="it is {answer}",
        temperature=0.8,
        max_new_tokens=9,
        chat_template_kwargs=[],
        keep_cut=False,
        form_ratio=0.5,
        task_seed=5,
        test_num=7,
        test_seed=1000,
        taps=[],
        extract_config="",
        train_config="",
        engine="auto",
        batch_rows=3,
    )


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


@pytest.mark.parametrize(
    ("command", "result"),
    [
        *(("score", each) for each in (None, 5, [], [{}], [{"arms": []}], {"arms": 1})),
        ("score", [{"arms": [{"arm": "base", "problems": 0, "right": 0}]}]),
        ("score", [{"arms": [{"arm": "base", "problems": 4, "right": 9}]}]),
        *(("sample", each) for each in (None, 5, [], {}, {"kept": "x"}, {"kept": -1})),
    ],
)
def test_a_result_that_no_step_has_is_one_line(command: str, result: Any, tmp_path: Path) -> None:  # noqa: ANN401
    path = tmp_path / "out" / "round-1" / "a.json"
    path.parent.mkdir(parents=True)
    document = {"argv": [command], "files": {}, "seconds": 1.0, "result": result}
    path.write_text(json.dumps(document))
    with pytest.raises(DamagedFileError, match="expected the result of a step. Fix: remove it"):
        steps.run_step(path, [command], files={})
    if command == "sample" and result is None:
        assert steps.run_step(path, [command], files={}, may_be_empty=True).result is None


def test_nothing_right_at_all_is_one_line(
    tiny_base_folder: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(improve_argv(tiny_base_folder, "out", "--rule", "easy_rule:refuse")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "answers were cut at the limit and none is right" in error


def test_settings_are_kept_once_a_step_is_done(
    tiny_base_folder: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(name: str, argv: Any) -> Any:  # noqa: ANN401
        raise InputError(f"{name} fails")

    monkeypatch.setattr(steps, "call_command", fail)
    for samples in ("2", "3"):
        assert main(improve_argv(tiny_base_folder, "out", "--samples", samples)) == 2
        assert capsys.readouterr().err.endswith("score fails\n")
        assert json.loads((work / "out" / "improve.json").read_text())["samples"] == int(samples)


def test_a_folder_of_before_max_samples_and_forms_resumes_without(
    tiny_base_folder: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = improve_argv(tiny_base_folder, "out", "--rounds", "1", "--form-ratio", "0")
    argv += ["--hint", ""]  # and without --shots
    assert main([*argv, "--max-samples", "0"]) == 0
    settings = json.loads((work / "out" / "improve.json").read_text())
    del settings["max_samples"], settings["form_ratio"], settings["hint"], settings["shots"]
    del settings["chat_template_kwargs"]
    settings["instruct_unsolved"] = False
    (work / "out" / "improve.json").write_text(json.dumps(settings))
    assert main([*argv, "--max-samples", "0"]) == 0
    assert capsys.readouterr().err.count("done before") == 5
    assert main(argv) == 2
    assert "--max-samples: expected 0 as in out/improve.json, got 32" in capsys.readouterr().err


def test_a_step_is_done_once_and_only_for_its_words_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[str]()
    monkeypatch.setattr(steps, "call_command", lambda name, _: calls.append(name) or {"kept": 3})
    path, files = tmp_path / "round-1" / "sample.json", {"questions.jsonl": "ab"}
    argv = ["sample", "--num", "4", "--out", f"{tmp_path}/round-1/corpus.jsonl"]
    first = steps.run_step(path, argv, files=files)
    assert steps.run_step(path, argv, files=files) == first
    assert calls == ["sample"]
    with pytest.raises(InputError, match="got that of one with '4' in place of '5'"):
        steps.run_step(path, [*argv[:2], "5", *argv[3:]], files=files)
    with pytest.raises(InputError, match="got that of one with '' in place of '--keep-cut'"):
        steps.run_step(path, [*argv, "--keep-cut"], files=files)
    with pytest.raises(InputError, match=r"questions.jsonl: expected the file that .*sample.json"):
        steps.run_step(path, argv, files={"questions.jsonl": "cd"})
    with pytest.raises(InputError, match=r"other.jsonl: expected the file that"):
        steps.run_step(path, argv, files=files | {"other.jsonl": "ab"})
    document = json.loads(path.read_text())
    assert document["argv"][-1] == "round-1/corpus.jsonl"
    del document["files"]  # as older ones
    path.write_text(json.dumps(document))
    assert steps.run_step(path, argv, files=files) == first
    path.write_text("{}")
    with pytest.raises(DamagedFileError, match="expected the result of a step. Fix: remove it"):
        steps.run_step(path, argv, files=files)


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
        (["--temperature", "0"], "--samples: expected 1 for greedy answers, got 2"),
        (["--keep", "-1"], "--keep: expected 0 or more"),
        (["--hint", "tell"], "--hint: expected a text with {answer}, got 'tell'"),
        (["--shots", "65"], "--shots: expected 0 to 64, got 65"),
        (["--shots", "1", "--tasks", "chain_sum"], "--shots: expected one task or data, got 2"),
        (["--form-ratio", "1.5"], "--form-ratio: expected 0 to 1, got 1.5"),
        (["--rule", "no_such_module:f"], "rule 'no_such_module:f': expected a function"),
        (["--train-config", "typo.yaml"], "--config: expected a YAML file or one of"),
        (["--extract-config", "tiny.yaml"], "tiny.yaml"),
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
    if "--test-num" not in more:
        assert not (work / "out").exists()


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
