"""`carryon train --score-every`: right answers, the same weights, errors at the start."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bases import make_tiny_base
from support.tiny_runs import Killed, assert_same_bits, kill_at

from carryon.cache import extract
from carryon.tools.cli.main import call_command, main
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.trainer import finish
from carryon.train.trainer.metrics import read_metrics

QUESTIONS = ["the an", "in the thing", "on", "another thing there"]
WAYS = {
    "device": "cpu",
    "width": 8,
    "blocks": 1,
    "heads": 2,
    "intermediate-size": 8,
    "dropout": 0.1,
    "tokens-per-step": 64,
    "epochs": 3,
    "learning-rate": 0.05,
    "checkpoint-every": 2,
    "sampled-softmax": 20,
}


@pytest.fixture(autouse=True)
def without_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "plot_curves", lambda metrics, path: False)


@pytest.fixture(scope="module")
def store(tiny_base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with completions; the question "known" is among those to train on."""
    rows = [
        {"prompt": f"{index} is the", "completion": " thing " * (index % 3 + 1)}
        for index in range(20)
    ]
    rows.append({"prompt": "known", "completion": " thing"})
    marked = [{**row, "split": "test" if at < 3 else "train"} for at, row in enumerate(rows)]
    root = tmp_path_factory.mktemp("scored") / "store"
    extract(base=tiny_base_folder, data=marked, out=root, unit_tokens=64)
    return root


@pytest.fixture
def data(tiny_base_folder: Path, tmp_path: Path) -> str:
    """Questions; the base is right on all but the second."""
    model = CarryOnForCausalLM.from_base(tiny_base_folder, device="cpu")
    texts = model.answer(QUESTIONS, max_new_tokens=4, chat=False)
    texts[1] = "not this"
    return write_questions(tmp_path / "questions.jsonl", QUESTIONS, texts)


def write_questions(path: Path, questions: Sequence[str], answers: Sequence[str]) -> str:
    records = [
        {"id": f"q{at}", "question": question, "answer": answer}
        for at, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def argv_of(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def score_ways(data: str, base: Path) -> list[str]:
    ways = ["--score-every", "2", "--score-base", str(base), "--score-tasks", data]
    return [*ways, "--score-rule", "exact", "--score-new-tokens", "4"]


def scores_of(out: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(out / "metrics.jsonl") if "accuracy" in line]


def test_scores_change_no_bit_and_end_with_what_the_command_score_finds(
    store: Path,
    data: str,
    tiny_base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    argv = ["--store", str(store), *argv_of(WAYS)]
    scored = [*argv, *score_ways(data, tiny_base_folder)]
    call_command("train", [*argv, "--out", str(tmp_path / "plain")])
    result = call_command("train", [*scored, "--out", str(tmp_path / "scored")])
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            call_command("train", [*scored, "--out", str(tmp_path / "resumed")])
    caplog.clear()
    call_command("train", [*scored, "--out", str(tmp_path / "resumed")])

    assert "dropped" not in caplog.text
    assert_same_bits(tmp_path / "scored", tmp_path / "plain")
    assert_same_bits(tmp_path / "resumed", tmp_path / "plain")
    lines = scores_of(tmp_path / "scored")
    num_steps = result["num_steps"]
    assert [line["step"] for line in lines] == [*range(0, num_steps, 2), num_steps]
    assert (lines[0]["accuracy"], lines[0]["scored"], lines[-1]["is_result"]) == (0.75, 4, True)
    assert lines[0]["accuracy_low"] < 0.75 < lines[0]["accuracy_high"]
    again = scores_of(tmp_path / "resumed")
    assert [line["accuracy"] for line in again] == [line["accuracy"] for line in lines]
    ways = ["--carryon", str(tmp_path / "scored/carryon"), "--base", str(tiny_base_folder)]
    ways += ["--tasks", data, "--rule", "exact", "--max-new-tokens", "4", "--device", "cpu"]
    [document] = call_command("score", [*ways, "--out", str(tmp_path / "answers.jsonl")])
    base, carryon = (arm["accuracy"] for arm in document["arms"])
    assert (base, carryon) == (lines[0]["accuracy"], result["accuracy"])
    assert carryon != base
    assert (result["accuracy_low"], result["scored"]) == (lines[-1]["accuracy_low"], 4)


def test_an_error_of_a_score_ends_the_run_with_a_checkpoint(
    store: Path,
    data: str,
    tiny_base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    rule = (
        "seen = []\ndef fails(text, problem):\n    seen.append(1)\n    return 1 / (len(seen) < 7)\n"
    )
    (tmp_path / "rules_of_train_scores.py").write_text(rule)
    argv = ["--store", str(store), *argv_of(WAYS), *score_ways(data, tiny_base_folder)]
    argv += ["--score-rule", "rules_of_train_scores:fails", "--out", str(tmp_path / "run")]
    assert main(["train", *argv]) == 2
    assert "rules_of_train_scores:fails" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == [
        "step-00000002"
    ]


def test_a_run_whose_last_score_fails_is_not_finished_and_ends_with_the_same_command(
    store: Path,
    data: str,
    tiny_base_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    rule = (
        "from pathlib import Path\n"
        "def counts(text, problem):\n"
        "    seen = len(Path('seen').read_text()) + 1 if Path('seen').exists() else 1\n"
        "    Path('seen').write_text('x' * seen)\n"
        "    return 1 / (seen != int(Path('fails').read_text()))\n"
    )
    (tmp_path / "rules_of_last_scores.py").write_text(rule)
    argv = ["--store", str(store), *argv_of(WAYS), *score_ways(data, tiny_base_folder)]
    argv += ["--score-rule", "rules_of_last_scores:counts"]
    (tmp_path / "fails").write_text("0")
    assert main(["train", *argv, "--out", str(tmp_path / "whole")]) == 0
    seen = len((tmp_path / "seen").read_text())
    (tmp_path / "seen").unlink()
    (tmp_path / "fails").write_text(str(seen))
    argv += ["--out", str(tmp_path / "run")]
    assert main(["train", *argv]) == 2
    assert "rules_of_last_scores:counts" in capsys.readouterr().err
    assert not (tmp_path / "run/result.json").exists()
    (tmp_path / "fails").write_text("0")
    assert main(["train", *argv]) == 0
    whole, again = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "run")
    )
    assert again["accuracy"] == whole["accuracy"] is not None
    assert again["carryon_nll"] == whole["carryon_nll"]
    results = [line for line in scores_of(tmp_path / "run") if line.get("is_result")]
    assert len(results) == 1


Ways = Callable[[Path, Path, str], list[str]]
WRONG: dict[str, tuple[Ways, str]] = {
    "no tasks": (lambda base, tmp, data: ["--score-every", "2"], "Fix: --score-tasks"),
    "no steps": (lambda base, tmp, data: ["--score-tasks", data], "Fix: --score-every 100"),
    "no scores": (
        lambda base, tmp, data: ["--score-rule", "end"],
        "--score-rule: expected with --score-every, got 0. Fix: --score-every 100",
    ),
    "negative": (lambda base, tmp, data: ["--score-every", "-1"], "--score-every: expected 0 or"),
    "none": (
        lambda base, tmp, data: [*score_ways(data, base), "--score-num", "0"],
        "--score-num: expected 1 or more, got 0",
    ),
    "no data": (
        lambda base, tmp, data: score_ways(str(tmp / "missing.jsonl"), base),
        "missing.jsonl",
    ),
    "other base": (
        lambda base, tmp, data: score_ways(data, make_tiny_base(tmp / "other", seed=1)),
        "expected the weights of",
    ),
    "trained on": (
        lambda base, tmp, data: score_ways(
            write_questions(tmp / "known.jsonl", ["known", "new"], ["a", "b"]), base
        ),
        "--score-tasks: 1 of 2 questions are in",
    ),
    "too long": (
        lambda base, tmp, data: score_ways(
            write_questions(tmp / "long.jsonl", ["the an " * 3000], ["a"]), base
        ),
        "prompts are longer",
    ),
    "mixture": (  # refused before the base is looked for
        lambda base, tmp, data: [*score_ways(data, tmp / "nowhere"), "--mix", "other"],
        "--score-every: expected 0 with mix",
    ),
    "merged kind": (
        lambda base, tmp, data: [*score_ways(data, base), "--kind", "native", "--dropout", "0"],
        "expected --kind bottleneck",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_end_before_the_run_begins(
    name: str,
    store: Path,
    data: str,
    tiny_base_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ways, expected = WRONG[name]
    argv = ["--store", str(store), *argv_of(WAYS), "--out", str(tmp_path / "run")]
    assert main(["train", *argv, *ways(tiny_base_folder, tmp_path, data)]) == 2
    [line] = capsys.readouterr().err.splitlines()[-1:]
    assert expected in line
    assert not (tmp_path / "run").exists()
