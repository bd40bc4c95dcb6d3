"""`carryon score` on tiny bases, and on a real one."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_carryons import make_tiny_carryon
from support.tiny_stores import extract_tiny

from carryon.cache.base.model import Base
from carryon.cache.errors import StoreBusyError
from carryon.tools.cli.main import call_command, main
from carryon.train.config import CarryOnSettings
from carryon.train.inference.modeling import CarryOnForCausalLM
from carryon.train.inference.scoring.answer_file import Answer, AnswerFile
from carryon.train.modules.serialization import save_carryon

QUESTIONS = ["the an", "in the thing", "on", "another thing there"]
SHORT = ["--max-new-tokens", "4", "--device", "cpu", "--compute-dtype", "float32"]


@pytest.fixture
def carryon(tiny_base: Base, tmp_path: Path) -> str:
    made, card = make_tiny_carryon(tiny_base)
    save_carryon(tmp_path / "carryon", made, card, dtype=torch.float32)
    return str(tmp_path / "carryon")


@pytest.fixture
def merged_carryon(tiny_base: Base, tmp_path: Path) -> str:
    """A carry-on whose card says that it is merged into its base."""
    made, card = make_tiny_carryon(tiny_base)
    card = replace(card, settings=CarryOnSettings(kind="native", dropout=0.0).to_dict())
    save_carryon(tmp_path / "native", made, card, dtype=torch.float32)
    return str(tmp_path / "native")


@pytest.fixture
def data(tiny_base: Base, tmp_path: Path) -> str:
    """Questions; the base is right on all but the second."""
    texts = CarryOnForCausalLM.from_base(tiny_base).answer(QUESTIONS, max_new_tokens=4)
    texts[1] = "not this"
    records = [
        {"id": f"q{at}", "question": question, "answer": text}
        for at, (question, text) in enumerate(zip(QUESTIONS, texts, strict=True))
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def odd_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A rule that random answers satisfy in about half of the cases."""
    monkeypatch.chdir(tmp_path)
    text = "def is_odd(text, problem):\n    return sum(map(ord, text)) % 2 == 1\n"
    (tmp_path / "rules_of_test_score.py").write_text(text)
    return "rules_of_test_score:is_odd"


def run(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """Return the JSON line of a call that must succeed, and its messages."""
    assert main(["score", *argv]) == 0, capsys.readouterr().err
    output = capsys.readouterr()
    [line] = output.out.splitlines()
    return json.loads(line), output.err


def test_arms_are_counted_side_by_side(
    carryon: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, out = tmp_path / "page.html", tmp_path / "answers.jsonl"
    arms = ["--arms", "base", "carryon@0", "carryon", "instruct:now", "few-shot:1"]
    argv = ["--carryon", carryon, "--tasks", data, "--rule", "exact", *arms, *SHORT]
    argv += ["--examples", "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"]
    document, err = run([*argv, "--html", str(page), "--out", str(out)], capsys)
    base, zero, full, instructed, few = document["arms"]
    assert (base["right"], base["accuracy"], base["problems"]) == (3, 0.75, 4)
    assert base["low"] < 0.75 < base["high"]
    assert (zero["right"], zero["won"], zero["lost"], zero["p"]) == (3, 0, 0, 1.0)
    assert full["right"] + instructed["right"] + few["right"] < 9
    assert full["lost"] > 0
    assert (document["rule"], document["alpha"], document["num"]) == ("exact", 1.0, 4)
    assert "carryon@0" in err
    assert "tokens/s" in err
    html = page.read_text()
    assert html.count('class="wrong"') + html.count('class="right"') == 20
    assert "<script" not in html
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 21
    assert {line["arm"] for line in lines[1:]} == set(arms[1:])


def test_an_interrupted_call_resumes_and_changes_nothing(
    carryon: str,
    data: str,
    odd_rule: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    argv = ["--carryon", carryon, "--tasks", data, "--rule", odd_rule, "--batch-rows", "1", *SHORT]
    argv += ["--temperature", "0.9", "--samples", "2"]
    expected, _ = run([*argv, "--out", str(whole)], capsys)
    generate, calls = CarryOnForCausalLM.generate, []

    def interrupt(self: CarryOnForCausalLM, *args: object, **given: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, *args, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(CarryOnForCausalLM, "generate", interrupt)
    assert main(["score", *argv, "--out", str(out)]) == 130
    assert "run the same command to resume" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 4
    document, err = run([*argv, "--out", str(out)], capsys)
    assert "3 of 8 answers are there" in err
    assert len(calls) == 4 + 13
    run([*argv, "--out", str(out)], capsys)
    assert len(calls) == 4 + 13

    def texts(path: Path) -> dict[tuple[str, ...], str]:
        lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
        return {(x["arm"], x["id"], str(x["sample"])): x["text"] for x in lines}

    assert texts(out) == texts(whole)
    assert len(set(texts(out).values())) > 4
    for arm, other in zip(document["arms"], expected["arms"], strict=True):
        assert arm["right"] == other["right"]
        assert arm["pass_at"].keys() == {"1", "2"}
        assert arm["pass_at"]["1"] == pytest.approx(arm["accuracy"])


def test_a_rule_that_fails_keeps_the_answers(
    data: str, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "failing_rule_of_test.py").write_text("def f(text, problem):\n    return 1 / 0\n")
    argv = ["--base", str(tiny_base_folder), "--tasks", data, "--out", "answers.jsonl", *SHORT]
    assert main(["score", *argv, "--rule", "failing_rule_of_test:f"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "ZeroDivisionError: division by zero (failing_rule_of_test.py:2)" in line
    _, err = run([*argv, "--rule", "exact"], capsys)
    assert "4 of 4 answers are there" in err


def test_a_second_writer_is_refused_by_its_number(
    data: str, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, append, refused = tmp_path / "answers.jsonl", AnswerFile.append, list[str]()
    argv = ["--base", str(tiny_base_folder), "--tasks", data, "--rule", "exact", *SHORT]
    argv += ["--batch-rows", "2", "--out", str(out)]

    def write_twice(self: AnswerFile, answers: Iterable[Answer]) -> None:
        append(self, answers)
        with pytest.raises(StoreBusyError) as caught:
            call_command("score", argv)
        refused.append(str(caught.value))

    monkeypatch.setattr(AnswerFile, "append", write_twice)
    document, _ = run(argv, capsys)
    line = f"{out}: process {os.getpid()} is writing to this file of answers. Fix: "
    assert [text.startswith(line) for text in refused] == [True, True]
    assert document["arms"][0]["right"] == 3
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".lock")] == []


def test_answers_to_a_prompt_that_has_changed_are_given_again(
    tiny_base_folder: Path, odd_rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, examples, page = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "p.html"))

    def score(system: str, right: str, example: str) -> str:
        told, asked = {"role": "system", "content": system}, {"role": "user", "content": "the an"}
        rows = [{"id": "1", "messages": [told, asked], "answer": right}]
        rows += [{"id": str(at), "question": "on " * at, "answer": "on"} for at in (2, 3, 4)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        examples.write_text(json.dumps({"question": example, "answer": "on"}) + "\n")
        argv = ["--base", str(tiny_base_folder), "--tasks", str(data), "--rule", odd_rule, *SHORT]
        argv += ["--arms", "base", "few-shot:1", "--examples", str(examples), "--html", str(page)]
        return run([*argv, "--out", str(tmp_path / "answers.jsonl")], capsys)[1]

    assert "are there" not in score("in", "old", "thing")
    err = score("in", "new", "thing")
    assert "base: 4 of 4 answers are there" in err
    assert "Right: new" in page.read_text()  # verdicts are those of the data as they are
    assert "Right: old" not in page.read_text()
    err = score("on", "new", "thing")
    assert "base: 3 of 4 answers are there" in err
    assert "few-shot:1: 3 of 4 answers are there" in err
    err = score("on", "new", "another")
    assert "base: 4 of 4 answers are there" in err
    assert "few-shot:1:" not in err.split("warning")[0].replace("base: 4", "")


def test_every_task_that_nothing_measures_is_named(
    data: str, tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(tmp_path / "other.jsonl")
    Path(other).write_text(Path(data).read_text())
    argv = ["score", "--base", str(tiny_base_folder), "--tasks", data, other, "--rule", "boxed"]
    assert main([*argv, *SHORT]) == 2
    err = capsys.readouterr().err
    assert f"{data}: rule: boxed finds nothing" in err
    assert f"{other}: rule: boxed finds nothing" in err


def test_a_killed_writer_leaves_no_lock(
    data: str, tiny_base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".answers.jsonl.lock").write_text("4711")  # the system dropped it with the process
    argv = ["--base", str(tiny_base_folder), "--tasks", data, "--rule", "exact", *SHORT]
    document, _ = run([*argv, "--out", str(tmp_path / "answers.jsonl")], capsys)
    assert document["arms"][0]["problems"] == 4


def test_another_rule_judges_the_same_answers(
    data: str, tiny_base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "answers.jsonl"
    argv = ["--base", str(tiny_base_folder), "--tasks", data, "--out", str(out), *SHORT]
    document, _ = run([*argv, "--rule", "exact"], capsys)
    assert document["arms"][0]["right"] == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lenient_rule_of_test.py").write_text("def f(text, problem):\n    return True\n")
    document, err = run([*argv, "--rule", "lenient_rule_of_test:f"], capsys)
    assert "4 of 4 answers are there" in err
    assert document["arms"][0]["right"] == 4
    assert all(json.loads(line)["is_right"] for line in out.read_text().splitlines()[1:])
    assert main(["score", *argv, "--rule", "exact", "--seed", "5"]) == 2
    assert "seed: expected 5, got answers made with 0" in capsys.readouterr().err


def test_merged_models_and_adapters_are_arms(
    data: str, tiny_base: Base, tiny_base_folder: Path, capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    peft = pytest.importorskip("peft")
    base = CarryOnForCausalLM.from_base(str(tiny_base_folder), device="cpu").base
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):  # of PEFT
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    arms = ["base", f"merged={tiny_base_folder}", f"lora={tmp_path / 'lora'}"]
    argv = ["--base", str(tiny_base_folder), "--tasks", data, "--rule", "exact", "--arms", *arms]
    kept = ["--out", str(tmp_path / "answers.jsonl")]
    document, _ = run([*argv, *SHORT, *kept], capsys)
    assert [arm["right"] for arm in document["arms"]] == [3, 3, 3]  # a new LoRA changes nothing
    adapter = tmp_path / "lora" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"lora_alpha": 400}))
    assert main(["score", *argv, *SHORT, *kept]) == 2
    assert "lora: expected answers of this model by this engine" in capsys.readouterr().err
    assert main(["score", *argv[:-1], f"lora={tiny_base_folder}", *SHORT]) == 2
    assert "expected a folder with adapter_model.safetensors" in capsys.readouterr().err


def test_questions_in_a_training_store_are_refused_or_dropped(
    tiny_base: Base, tiny_base_folder: Path, data: str, tmp_path: Path, store_tmp: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def turns(question: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]

    corpus = tmp_path / "corpus.jsonl"
    asked = ["In  the THING", "another thing there is", "on", "quite another"]
    records = [
        {"id": f"s{at}", "messages": turns(text), "split": "test" if text == "on" else "train"}
        for at, text in enumerate(asked)
    ]
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    store = store_tmp / "known"
    extract_tiny(tiny_base, corpus, store)
    argv = ["--base", str(tiny_base_folder), "--tasks", data, "--rule", "exact", *SHORT]
    assert main(["score", *argv, "--store", str(store)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 4 questions are in" in line
    assert "such as q1. Fix: --drop-known" in line
    document, _ = run([*argv, "--store", str(store), "--drop-known"], capsys)
    assert (document["num"], document["known"]) == (3, 1)
    assert document["arms"][0]["right"] == 3


def test_a_task_has_a_line_with_every_number(
    carryon: str, odd_rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--carryon", carryon, "--tasks", "chain_sum:min_terms=2,max_terms=2", "--num", "3"]
    document, _ = run([*argv, "--rule", odd_rule, "--seed", "3", *SHORT], capsys)
    assert document["task"] == "chain_sum:min_terms=2,max_terms=2"
    assert [arm["arm"] for arm in document["arms"]] == ["base", "carryon"]
    assert document["arms"][0].keys() >= {"cut", "found", "tokens", "seconds", "tokens_per_s"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--tasks", "no_such_task"], "expected a task of reasoning-gym"),
        (["--tasks", "no/such.jsonl"], "no/such.jsonl"),
        (["--tasks", "chain_sum", "--num", "0"], "--num: expected 1 or more, got 0"),
        (["--tasks", "chain_sum", "--html", "/"], "--html: expected a file for the page, got the"),
        (["--tasks", "chain_sum", "--drop-known"], "--drop-known: expected with --store, got none"),
        (["--tasks", "chain_sum", "--examples", "x"], "--examples: expected a few-shot arm, got n"),
        (["--tasks", "chain_sum", "--samples", "2"], "Fix: --temperature 0.8"),
        (["--tasks", "chain_sum", "--rule", "best"], "rule: expected last-number"),
        (["--tasks", "chain_sum", "--arms", "bases"], "arms: expected base"),
        (["--tasks", "chain_sum", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--tasks", "gsm_symbolic", "--num", "2"], "2 of 2 prompts are longer, the first is gsm"),
        (["--tasks", "chain_sum", "--rule", "boxed"], "rule: boxed finds nothing in any of the 6"),
        (["--tasks", "chain_sum", "--rule", "exact"], "all 6 answers were cut at the limit"),
    ],
)
def test_wrong_options_and_nothing_to_measure_are_one_line(
    options: list[str], text: str, carryon: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["score", "--carryon", carryon, "--num", "3", *SHORT, *options]
    assert main(argv) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert text in line
    assert "error" in line


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--arms", "base", "carryon=no/where"], "no/where"),
        (["--arms", "base", "merged=./no/where"], "./no/where"),
        (["--arms", "base", "lora=no/where"], "expected a folder with adapter_model.safetensors"),
        (["--arms", "base", "--mix", "x"], "--mix: expected an arm that answers with --carryon"),
        (["--html", "FILE/page.html"], "--html: expected a place for a file, got"),
        (["--mix-device", "cpu"], "expected a mixture of several bases with --mix"),
        (["--arms", "carryon=MERGED@0.5"], "expected no alpha for a carry-on of the kind native"),
    ],
)
def test_a_model_that_cannot_answer_is_refused_before_anything_is_loaded(
    options: list[str], text: str, carryon: str, merged_carryon: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = f"{merged_carryon}/carryon.json"
    options = [each.replace("MERGED", merged_carryon).replace("FILE", file) for each in options]
    argv = ["score", "--carryon", carryon, "--base", "./nothing", "--tasks", "chain_sum", *options]
    assert main(argv) == 2
    assert text in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.real
def test_a_real_base_answers_a_task(
    real_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "leg_counting:min_animals=2,max_animals=2"
    argv = ["--base", str(real_base), "--tasks", task, "--num", "4", "--max-new-tokens", "24"]
    arms = ["--arms", "base", "few-shot:3"]
    out = tmp_path / "answers.jsonl"
    document, _ = run([*argv, *arms, "--out", str(out)], capsys)
    base, few = document["arms"]
    for arm in document["arms"]:
        lines = [json.loads(line) for line in out.read_text().splitlines()[1:]]
        answers = [each for each in lines if each["arm"] == arm["arm"]]
        assert arm["right"] == sum(each["is_right"] for each in answers)
        assert arm["tokens"] == sum(each["tokens"] for each in answers)
        assert len({each["question"] for each in answers}) == arm["problems"] == 4
    assert few["tokens"] < base["tokens"]  # bare answers are shown, so bare answers follow
    assert few["found"] == 1.0
