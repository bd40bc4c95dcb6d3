"""`carryon sample` on a tiny base: corpora, resume, refusals."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from carryon.cache.errors import StoreBusyError
from carryon.cache.store.reader import Store
from carryon.tools.cli.main import call_command, main
from carryon.train.inference.sampling import selection, trial
from carryon.train.inference.sampling.examples import draw_examples
from carryon.train.inference.scoring.answer_file import AnswerFile
from carryon.train.inference.scoring.problems import digest_messages, read_problems


def sample_argv(base: Path, out: str = "c.jsonl", *more: str) -> list[str]:
    argv = ["sample", "--base", str(base), "--data", "problems.jsonl", "--out", out]
    argv += ["--rule", "easy_rule:accept", "--samples", "4", "--max-new-tokens", "6"]
    return [*argv, "--keep-cut", "--device", "cpu", "--compute-dtype", "float32", *more]


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_line_of(text: str) -> Any:  # noqa: ANN401
    return json.loads(text.splitlines()[-1])


def last_line(capsys: pytest.CaptureFixture[str]) -> Any:  # noqa: ANN401
    return last_line_of(capsys.readouterr().out)


def test_a_corpus_of_verified_answers_is_extracted(
    tiny_base_folder: Path, easy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--instruction", "think", "--keep", "3", "--task-seed", "5", "--seed", "7"]
    assert main(sample_argv(tiny_base_folder, "c.jsonl", *more)) == 0
    facts = last_line(capsys)
    records = read_lines(easy / "c.jsonl")
    assert facts["tried"] == 64
    assert facts["kept"] == len(records) > 16
    assert facts["kept"] + facts["equal"] + facts["surplus"] == facts["right"] < 64
    texts = [(each["messages"][0]["content"], each["messages"][1]["content"]) for each in records]
    assert len(set(texts)) == len(texts)
    assert not any("think" in question for question, _ in texts)
    origin = records[0]["sampled"]
    assert origin["task"] == "problems.jsonl"
    assert origin["problem"].startswith("q")
    assert (origin["task_seed"], origin["sample_seed"]) == (5, 7)
    assert (origin["instruction"], origin["temperature"]) == ("think", 0.8)
    assert (origin["carryon"], origin["carryon_sha256"]) == ("", "")
    assert len(origin["base_sha256"]) == 64
    per_problem = [each["sampled"]["problem"] for each in records]
    assert max(map(per_problem.count, per_problem)) <= 3
    extract = ["extract", "--base", str(tiny_base_folder), "--data", "c.jsonl", "--out", "store"]
    assert main([*extract, "--device", "cpu"]) == 0
    assert Store.open(easy / "store").num_samples == len(records)


def test_a_question_of_several_problems_has_no_more_records_than_of_one(
    tiny_base_folder: Path, easy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": f"q{at}", "question": "the " * (at % 3 + 1), "answer": "x"} for at in range(12)]
    (easy / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:7]))
    (easy / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[7:]))
    more = ["--data", "problems.jsonl", "others.jsonl", "--keep", "5", "--held-out-ratio", "0.6"]
    assert main(sample_argv(tiny_base_folder, "c.jsonl", *more)) == 0
    records = read_lines(easy / "c.jsonl")
    asked = [record["messages"][0]["content"] for record in records]
    assert max(map(asked.count, asked)) == 5
    halves = {(record["messages"][0]["content"], record.get("split")) for record in records}
    assert len(halves) == 3  # no question is in both
    assert {half for _, half in halves} == {"held-out", None}
    facts = last_line(capsys)
    assert facts["kept"] + facts["equal"] + facts["surplus"] == facts["right"]


def test_the_instruction_is_stored_when_told(tiny_base_folder: Path, easy: Path) -> None:
    more = ["--instruction", "think", "--keep-instruction", "--num", "2"]
    assert main(sample_argv(tiny_base_folder, "c.jsonl", *more)) == 0
    records = read_lines(easy / "c.jsonl")
    assert all(each["messages"][0]["content"].endswith("\n\nthink") for each in records)


def test_examples_and_hints_are_in_prompts_and_not_in_the_corpus(
    tiny_base_folder: Path, easy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solved = [{"question": f"q{at}", "answer": f"w{at}"} for at in range(6)]
    (easy / "solved.jsonl").write_text("".join(json.dumps(each) + "\n" for each in solved))
    more = ["--shots", "2", "--examples", "solved.jsonl", "--hint", "is {answer}"]
    more += ["--instruction", "t", "--keep-instruction", "--samples", "1"]
    argv = sample_argv(tiny_base_folder, "c.jsonl", *more, "--temperature", "0")
    assert main(argv) == 0
    assert last_line(capsys)["tried"] == 16
    records = read_lines(easy / "c.jsonl")
    assert records
    for record in records:
        [asked, _] = record["messages"]
        assert asked["content"] == f"{record['sampled']['question']}\n\nt"
    origin = records[0]["sampled"]
    assert (origin["hint"], origin["shots"]) == ("is {answer}", 2)
    assert len(origin["examples_sha256"]) == 64

    [drawn] = draw_examples(
        {"problems.jsonl": read_problems("problems.jsonl", num=99, seed=0)},
        source="solved.jsonl",
        shots=2,
        seed=0,
    )
    digests = {each["id"]: each["prompt"] for each in read_lines(easy / ".c.jsonl.answers")[1:]}
    behind = "\n\nt\n\nis"
    shown = [
        (f"{each.question}{behind} {each.answer}", each.answer)
        for each in drawn["problems.jsonl"][:2]
    ]
    messages = [
        {"role": role, "content": text}
        for pair in shown
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    asked = {"role": "user", "content": f"the the 1{behind} x"}
    assert digests["q1"] == digest_messages([*messages, asked])

    assert main(argv) == 0  # nothing is generated again
    assert "16 of 16 answers are there" in capsys.readouterr().err
    for change in (["--hint", "{answer}!"], ["--shots", "1"], ["--examples", "problems.jsonl"]):
        assert main([*argv, *change]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert ".c.jsonl.answers" in error


def read_rounds(text: str) -> list[tuple[int, dict[int, int], list[int]]]:
    """Return of each round of a trial its problems, set -> right answers, and the sets left."""
    rounds = list[tuple[int, dict[int, int], list[int]]]()
    for line in text.splitlines():
        if match := re.search(r"right answers of (\d+): (.*); left: (.*)", line):
            pairs = [pair.split(": ") for pair in match[2].split(", ")]
            rights = {int(number): int(right) for number, right in pairs}
            rounds.append((int(match[1]), rights, [int(each) for each in match[3].split(", ")]))
    return rounds


@pytest.mark.parametrize("keeps_cut", [True, False])
def test_of_sets_of_examples_the_better_half_is_tried_further_until_one_asks_the_rest(
    keeps_cut: bool,  # noqa: FBT001
    tiny_base_folder: Path,
    easy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trial, "TRIED", 4)
    (easy / "solved.jsonl").write_text(
        "".join(f'{{"question": "q{at}", "answer": "w{at}"}}\n' for at in range(10))
    )
    for seed in range(16):  # another core may write other answers
        argv = sample_argv(tiny_base_folder, f"c{seed}.jsonl", "--samples", "2")
        argv += ["--shots", "1", "--examples", "solved.jsonl", "--example-sets", "5"]
        argv += ["--examples-out", f"best{seed}.jsonl"]
        if not keeps_cut:  # most answers of a tiny base never end
            argv.remove("--keep-cut")
            argv += ["--max-new-tokens", "24"]
        argv += ["--batch-rows", "4", "--temperature", "1.5", "--seed", str(seed)]
        assert main(argv) == 0
        output = capsys.readouterr()
        rounds = read_rounds(output.err)
        if rounds[0][2] != [1, 2, 3]:  # not the first ones are left
            break
    assert [total for total, _, _ in rounds] == [4, 8, 16]
    assert [len(rights) for _, rights, _ in rounds] == [5, 3, 2]
    for (_, rights, left), after in zip(rounds, [*rounds[1:], None], strict=True):
        ranked = sorted(rights, key=lambda number: (-rights[number], number))
        assert left == sorted(ranked[: len(left)])
        assert after is None or list(after[1]) == left
    [best] = rounds[-1][2]
    assert rounds[0][2] != [1, 2, 3]

    corpus_path, answers_path = easy / f"c{seed}.jsonl", easy / f".c{seed}.jsonl.answers"
    answers = read_lines(answers_path)[1:]
    by_arm = {
        number: [each for each in answers if each["arm"] == f"base, examples {number}"]
        for number in range(1, 6)
    }
    for number, own in by_arm.items():
        for total, rights, _ in rounds:
            first = [each for each in own if not each["sample"] and int(each["id"][1:]) < total]
            if number in rights:
                counted = [each for each in first if keeps_cut or not each["is_cut"]]
                assert sum(each["is_right"] for each in counted) == rights[number]
        most = max(total for total, rights, _ in rounds if number in rights)
        assert len(own) == (32 if number == best else most)
    facts = last_line_of(output.out)
    assert facts["tried"] == 32
    assert facts["new_tokens"] == sum(each["tokens"] for each in answers)
    assert facts["right"] == sum(each["is_right"] for each in by_arm[best])
    records = read_lines(corpus_path)
    kept = {each["messages"][-1]["content"] for each in records}
    assert kept <= {each["text"].strip() for each in by_arm[best]}
    assert {each["sampled"]["example_set"] for each in records} == {best}
    shown = read_lines(easy / f"best{seed}.jsonl")
    assert [each["question"] for each in shown] == [f"q{2 * best - 2}", f"q{2 * best - 1}"]
    assert [each["answer"] for each in shown] == [f"w{2 * best - 2}", f"w{2 * best - 1}"]

    corpus, saved = corpus_path.read_bytes(), answers_path.read_bytes()
    assert main(argv) == 0  # nothing is generated again
    assert answers_path.read_bytes() == saved
    assert corpus_path.read_bytes() == corpus
    lines = saved.splitlines(keepends=True)
    answers_path.write_bytes(b"".join(lines[:7]))  # killed in the trial of the second set
    assert main(argv) == 0
    assert len(read_lines(answers_path)[1:]) == len(answers)


def test_examples_that_were_shown_are_shown_again_in_their_order(
    tiny_base_folder: Path, easy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"question": f"q{at}", "answer": f"w{at}", "sampled": {"right": f"r{at}"}}
        for at in range(60)
    ]
    (easy / "solved.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--shots", "3", "--samples", "1", "--hint", "is {answer}"]
    first = ["--examples", "solved.jsonl", "--examples-out", "shown.jsonl"]
    assert main(sample_argv(tiny_base_folder, "a.jsonl", *more, *first)) == 0
    assert len(read_lines(easy / "shown.jsonl")) == 4  # one may be the problem itself
    saved = (easy / "shown.jsonl").read_bytes()
    assert main(sample_argv(tiny_base_folder, "a.jsonl", *more, *first)) == 0  # resumed
    (easy / "shown.jsonl").write_text("mine\n")
    capsys.readouterr()
    for out, sets in (("a.jsonl", "1"), ("new.jsonl", "2")):
        argv = sample_argv(tiny_base_folder, out, *more, *first, "--example-sets", sets)
        assert main(argv) == 2
        assert "Fix: another --examples-out" in capsys.readouterr().err.splitlines()[-1]
        assert (easy / "shown.jsonl").read_text() == "mine\n"
    same = [*first[:3], "b.jsonl"]
    assert main(sample_argv(tiny_base_folder, "b.jsonl", *more, *same)) == 2
    assert "expected another file than --out" in capsys.readouterr().err
    assert not (easy / ".new.jsonl.answers").exists()  # told before any answer
    (easy / "shown.jsonl").write_bytes(saved)
    again = ["--examples", "shown.jsonl", "--seed", "9"]
    assert main(sample_argv(tiny_base_folder, "b.jsonl", *more, *again)) == 0
    prompts = [
        {each["id"]: each["prompt"] for each in read_lines(easy / f".{name}.jsonl.answers")[1:]}
        for name in "ab"
    ]
    assert len(prompts[0]) == 16
    assert prompts[0] == prompts[1]
    assert last_line(capsys)["tried"] == 16


def test_an_interrupted_sampling_resumes_with_the_same_corpus(
    tiny_base_folder: Path, easy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--batch-rows", "4"]
    assert main(sample_argv(tiny_base_folder, "whole.jsonl", *more)) == 0
    append, calls = AnswerFile.append, list[int]()

    def stop(self: AnswerFile, answers: Any) -> None:  # noqa: ANN401
        append(self, answers)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerFile, "append", stop)
    assert main(sample_argv(tiny_base_folder, "c.jsonl", *more)) == 130
    assert len(read_lines(easy / ".c.jsonl.answers")) == 1 + 12
    with (easy / ".c.jsonl.answers").open("ab") as file:
        file.write(b'{"task": "cut off')
    assert not (easy / "c.jsonl").exists()
    assert main(sample_argv(tiny_base_folder, "c.jsonl", *more)) == 0
    assert len(calls) == 16
    assert (easy / "c.jsonl").read_bytes() == (easy / "whole.jsonl").read_bytes()


def test_a_second_writer_is_refused_by_its_number(
    tiny_base_folder: Path, easy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, refused = AnswerFile.append, list[str]()

    def write_twice(self: AnswerFile, answers: Any) -> None:  # noqa: ANN401
        append(self, answers)
        with pytest.raises(StoreBusyError) as caught:
            call_command("sample", sample_argv(tiny_base_folder)[1:])
        refused.append(str(caught.value))

    monkeypatch.setattr(AnswerFile, "append", write_twice)
    assert main(sample_argv(tiny_base_folder, "c.jsonl", "--batch-rows", "32")) == 0
    line = f"c.jsonl: process {os.getpid()} is writing to this corpus. Fix: wait for it, or stop it"
    assert refused == [line, line]
    assert len(read_lines(easy / ".c.jsonl.answers")) == 1 + 64
    assert not list(easy.glob(".*.lock"))


def test_more_samples_cost_only_those(tiny_base_folder: Path, easy: Path) -> None:
    assert main(sample_argv(tiny_base_folder)) == 0
    first = read_lines(easy / ".c.jsonl.answers")
    assert main(sample_argv(tiny_base_folder, "c.jsonl", "--samples", "5", "--keep", "0")) == 0
    assert len(read_lines(easy / ".c.jsonl.answers")) == len(first) + 16
    assert read_lines(easy / "c.jsonl")


def test_answers_to_a_group_of_problems_are_held_out_together(
    tiny_base_folder: Path, easy: Path
) -> None:
    rows = [json.loads(line) for line in (easy / "problems.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["split_group"] = number % 4
    (easy / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--keep", "3", "--held-out-ratio", "0.5"]
    assert main(sample_argv(tiny_base_folder, "c.jsonl", *more)) == 0
    halves = {None: set[str](), "held-out": set[str]()}
    for record in read_lines(easy / "c.jsonl"):
        halves[record.get("split")].add(record["split_group"])
    assert all(halves.values())
    assert halves[None].isdisjoint(halves["held-out"])


def test_problems_without_a_right_answer_get_more(
    tiny_base_folder: Path, easy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (easy / "easy_rule.py").write_text(
        "def accept(text, problem):\n    return sum(map(ord, text)) % 6 == 0\n"
    )
    argv = sample_argv(tiny_base_folder, "c.jsonl", "--samples", "1")
    assert main(argv) == 0
    once = last_line(capsys)
    assert once["tried"] == 16
    assert 4 < once["unsolved"] < 16

    assert main([*argv, "--max-samples", "3"]) == 0  # 1, then 2, then 3
    output = capsys.readouterr()
    more = last_line_of(output.out)
    twice, thrice = [
        int(line.split()[0]) for line in output.err.splitlines() if "have no right answer" in line
    ]
    assert twice == once["unsolved"] > thrice
    assert more["tried"] == 16 + twice + thrice
    assert more["unsolved"] < thrice
    assert len(read_lines(easy / "c.jsonl")) == more["kept"] > once["kept"]
    assert (
        main(sample_argv(tiny_base_folder, "d.jsonl", "--samples", "1", "--max-samples", "3")) == 0
    )
    assert last_line(capsys)["tried"] > 16

    corpus = (easy / "c.jsonl").read_bytes()
    assert main([*argv, "--max-samples", "3"]) == 0  # nothing is generated again
    assert "16 of 16 answers are there" in capsys.readouterr().err
    assert (easy / "c.jsonl").read_bytes() == corpus


def test_forms_are_compared_within_each_source(
    tiny_base_folder: Path, easy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (easy / "problems.jsonl").read_text().splitlines(keepends=True)
    (easy / "others.jsonl").write_text("".join(rows[:5]))
    compared = list[int]()

    def rate(rows: list[list[Any]]) -> list[list[float]]:
        compared.append(len(rows))
        return [[0.0] * len(row) for row in rows]

    monkeypatch.setattr(selection, "rate_forms", rate)
    more = ["--data", "problems.jsonl", "others.jsonl", "--form-ratio", "0.5"]
    assert main(sample_argv(tiny_base_folder, "c.jsonl", *more)) == 0
    assert compared == [len(rows), 5]


def test_right_answers_that_are_all_of_poor_forms_are_told(
    tiny_base_folder: Path,
    easy: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(selection, "rate_forms", lambda rows: [[-0.1] * len(row) for row in rows])
    assert main(sample_argv(tiny_base_folder, "c.jsonl", "--form-ratio", "0.5")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "right answers are of forms that are seldom right" in error
    assert "Fix: a smaller --form-ratio, or 0" in error


def test_another_setting_or_a_foreign_file_is_refused(
    tiny_base_folder: Path, easy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(sample_argv(tiny_base_folder)) == 0
    assert main(sample_argv(tiny_base_folder, "c.jsonl", "--temperature", "0.5")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "temperature: expected 0.5, got answers made with 0.8. Fix: another --out" in error
    assert main(sample_argv(tiny_base_folder, "problems.jsonl")) == 2
    assert "expected a new file" in capsys.readouterr().err
    assert main(sample_argv(tiny_base_folder, str(easy))) == 2
    assert "got the folder" in capsys.readouterr().err


def test_an_empty_verified_set_shows_three_answers(
    tiny_base_folder: Path, easy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--rule", "easy_rule:refuse"]
    assert main(sample_argv(tiny_base_folder, "c.jsonl", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "none of 64 answers is right by the rule easy_rule:refuse" in error
    assert error.count("(right: 'x')") == 3
    assert not (easy / "c.jsonl").exists()


def test_all_right_answers_cut_is_told(
    tiny_base_folder: Path, easy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--no-keep-cut", "--max-new-tokens", "1"]
    assert main(sample_argv(tiny_base_folder, "c.jsonl", *more)) == 2
    assert "were cut at the limit of new tokens. Fix: raise" in capsys.readouterr().err


def test_known_answers_are_left_out_and_solved_problems_too(
    tiny_base_folder: Path, easy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(sample_argv(tiny_base_folder, "a.jsonl", "--samples", "1")) == 0
    num_solved = len(read_lines(easy / "a.jsonl"))
    more = ["--known", "a.jsonl", "--unsolved"]
    assert main(sample_argv(tiny_base_folder, "b.jsonl", *more)) == 0
    assert last_line(capsys)["problems"] == 16 - num_solved
    assert (
        main(sample_argv(tiny_base_folder, "d.jsonl", "--samples", "1", "--known", "a.jsonl")) == 2
    )
    assert f"all {num_solved} right answers of 16 are in --known" in capsys.readouterr().err
    more = ["--known", "a.jsonl", "b.jsonl", "--unsolved"]
    assert main(sample_argv(tiny_base_folder, "e.jsonl", *more)) == 2
    assert "expected a problem without an answer in --known" in capsys.readouterr().err


def test_long_prompts_are_named_or_left_out(
    tiny_base_folder: Path, easy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (easy / "problems.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "question": "z" * 3000, "answer": "x"}) + "\n")
    more = ["--max-new-tokens", "20"]
    assert main(sample_argv(tiny_base_folder, "c.jsonl", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 17 are longer, the first is long with" in error
    assert "--drop-long" in error
    assert main(sample_argv(tiny_base_folder, "c.jsonl", *more, "--drop-long")) == 0
    assert last_line(capsys)["dropped"] == 1


def test_test_problems_are_not_posed(
    tiny_base_folder: Path, easy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(sample_argv(tiny_base_folder, "c.jsonl", "--test-num", "6")) == 0
    assert last_line(capsys)["problems"] == 10
    assert main(sample_argv(tiny_base_folder, "d.jsonl", "--test-num", "16")) == 2
    assert "got 16 that all are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--samples", "0"], "--samples: expected 1 or more"),
        (["--keep", "-1"], "--keep: expected 0 or more"),
        (["--form-ratio", "-0.5"], "--form-ratio: expected 0 to 1, got -0.5"),
        (["--max-samples", "-1"], "--max-samples: expected 0 or more"),
        (
            ["--temperature", "0", "--samples", "1", "--max-samples", "2"],
            "--max-samples: expected 1",
        ),
        (["--temperature", "0"], "--samples: expected 1 for greedy"),
        (["--unsolved"], "--unsolved: expected corpora"),
        (["--keep-instruction"], "expected an --instruction"),
        (["--held-out-ratio", "1"], "--held-out-ratio: expected 0 to below 1"),
        (["--known", "none.jsonl"], "expected a corpus of carryon sample, got none"),
        (["--data", "none"], "--data: expected a file with problems"),
        (["--rule", "nothing"], "rule: expected"),
        (["--carryon", "none"], "none"),
        (["--top-p", "0.9", "--temperature", "0", "--samples", "1"], "--top-p: expected 1 for"),
        (["--test-seed", "5"], "--test-seed: expected a --test-num, got none"),
        (["--shots", "65"], "--shots: expected 0 to 64, got 65"),
        (["--shots", "1", "--example-sets", "0"], "--example-sets: expected 1 or more, got 0"),
        (["--example-sets", "2"], "--example-sets: expected a number of --shots, got none"),
        (["--examples", "problems.jsonl"], "--examples: expected a number of --shots, got none"),
        (["--examples-out", "x.jsonl"], "--examples-out: expected a number of --shots, got none"),
        (
            ["--shots", "1", "--examples-out", "x.jsonl", "--tasks", "chain_sum"],
            "--examples-out: expected one task or data, got 2",
        ),
        (["--shots", "1", "--examples", "none.jsonl"], "none.jsonl"),
        (
            ["--hint", "tell it"],
            "--hint: expected a text with {answer}, got 'tell it'. Fix: --hint",
        ),
        (["--alpha", "0.5"], "--alpha: expected a carry-on, got none. Fix: --carryon"),
    ],
)
def test_wrong_input_is_one_line(
    more: list[str],
    told: str,
    tiny_base_folder: Path,
    easy: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(sample_argv(tiny_base_folder, "c.jsonl", *more)) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert not (easy / "c.jsonl").exists()


def test_neither_tasks_nor_data(easy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--base", "none", "--out", str(easy / "c.jsonl")]) == 2
    assert "expected a task, or data" in capsys.readouterr().err


@pytest.mark.real
def test_a_real_base_solves_some_sums(
    real_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sample", "--base", str(real_base), "--out", str(tmp_path / "c.jsonl")]
    argv += ["--tasks", "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"]
    argv += ["--num", "4", "--samples", "4", "--max-new-tokens", "32", "--keep-cut"]
    assert main([*argv, "--instruction", "Think step by step."]) == 0
    facts = last_line(capsys)
    assert facts["tried"] == 16
    assert 1 <= facts["kept"] <= facts["right"] < 16
    for record in read_lines(tmp_path / "c.jsonl"):
        assert record["sampled"]["right"] in record["messages"][1]["content"]
        assert "step by step" not in record["messages"][0]["content"]


@pytest.mark.real
def test_a_real_base_writes_what_it_is_told_in_the_form_of_the_examples(
    real_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "chain_sum:min_terms=2,max_terms=2,min_digits=2,max_digits=2"
    examples = tmp_path / "examples.jsonl"
    with examples.open("w") as file:
        for problem in read_problems(task, num=8, seed=900):
            formula = problem.metadata["expression"]
            worked = {"question": problem.question, "answer": f"{formula} = {problem.answer}"}
            file.write(json.dumps(worked) + "\n")
    argv = ["sample", "--base", str(real_base), "--tasks", task, "--num", "16", "--samples", "1"]
    argv += ["--temperature", "0", "--shots", "8", "--examples", str(examples)]
    argv += ["--max-new-tokens", "24"]
    code = main([*argv, "--out", str(tmp_path / "untold.jsonl")])
    assert code in (0, 2)  # with some rounding none of them is right
    untold = last_line(capsys)["right"] if code == 0 else 0
    hint = ["--hint", "The answer is {answer}."]
    assert main([*argv, *hint, "--out", str(tmp_path / "told.jsonl")]) == 0
    told = last_line(capsys)["right"]
    assert told >= 12 > untold
    for record in read_lines(tmp_path / "told.jsonl"):
        [asked, answer] = record["messages"]
        assert "answer is" not in asked["content"]
        assert re.search(r"\d+ [+-] \d+ = -?\d+", answer["content"])
